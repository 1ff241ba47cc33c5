"""Benchmarks of qengine against its peers and against what the machine allows. Not part of the installed package."""
