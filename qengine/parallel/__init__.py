"""Tensor-parallel group and collectives. A single rank needs no process group."""
