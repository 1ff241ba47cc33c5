"""Our own kernels for the CPU, in C (`src/`), and the way to them from torch.

The library is built when the package is installed, if there is a C compiler; `library.load` finds it and says why where
there is none; `linear.cpu_check` asks whether what it computes is right on this processor. Everything runs without it,
on torch's kernels.
"""
