"""The one place that imports a package late: packages that are heavy or optional.

Invariant: a missing package becomes a ConfigError with the exact install line. It does not cache: Python does.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from qengine.errors import ConfigError


def import_late(module: str, *, needed_for: str = "", install: str = "") -> ModuleType:
    """Import `module` now.

    Raises:
        ConfigError: if the package is not installed; names what needs it and the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
            raise
        purpose = f" is needed for {needed_for} and" if needed_for else ""
        raise ConfigError(
            f"the package '{error.name}'{purpose} is not installed; run: {install or f'pip install {error.name}'}"
        ) from error
