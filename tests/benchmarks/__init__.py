"""Tests of the benchmarks: their arithmetic, records, errors and processes; never how fast something is."""
