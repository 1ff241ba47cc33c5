"""Our own kernels for the CPU, in C (`src/`), and the way to them from torch.

The library is built when the package is installed, if there is a C compiler; `binding.load` finds it and says why where
there is none; `linear.cpu_check` asks whether what it computes is right on this processor. Everything runs without it,
on torch's kernels.
"""

from __future__ import annotations

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

_NAME = "_cpu"


def library_file() -> Path | None:
    """The compiled library's file; None if it was not built. Whether it can be loaded is `binding.load`'s business."""
    candidates = (Path(__file__).with_name(_NAME + suffix) for suffix in EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)
