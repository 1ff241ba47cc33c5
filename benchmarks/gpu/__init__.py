"""Measurements on a CUDA GPU: what `benchmarks.gpu_check` and `benchmarks.tune` are made of.

Kernels need torch, triton, numpy and pytest alone, models what qengine itself needs. What can be tested without a GPU
is kept apart from what cannot: `timing`, `contenders` and `device` touch one, and tests put others in their place.
"""
