"""Measurements on a CUDA GPU: what `benchmarks.gpu_check` and `benchmarks.tune` are made of.

They need torch, triton, numpy and pytest alone. Everything that can be tested without a GPU is kept apart from what
cannot: only `timing` and `contenders` touch a device.
"""
