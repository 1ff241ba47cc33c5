"""Kernels for quantized linears: PackedWeight, its specification in plain torch, and what runs it on each device.

Imports torch (and triton) only; knows nothing of files, models or servers.
"""
