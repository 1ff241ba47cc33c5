"""The one place of this package that imports by name: transformers, which is heavy and which reading needs nothing of.

Invariant: no module here loads transformers by being imported, and nothing of a checkpoint is ever imported.
"""

from __future__ import annotations

import importlib
from types import ModuleType


def import_transformers() -> ModuleType:
    """The package, imported now."""
    return importlib.import_module("transformers")
