"""The one import of this package that may fail: triton, which CPUs do not need and some systems do not have.

Kernels in Triton import it at their top, and are themselves imported through here, when a GPU asks for them.
"""

from __future__ import annotations

import importlib
from types import ModuleType


def try_import(module: str) -> ModuleType | None:
    """Import `module` now; None if triton is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        return None
