"""The one place that imports a package late: packages that are heavy or optional.

Invariant: a missing package becomes a ConfigError with the exact install line. It does not cache: Python does.
While modules are imported and models are loaded nothing that is made is garbage, so `no_garbage` spares Python's
collector its walks through all of torch: a sixth of the time that importing it takes.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from qengine.errors import ConfigError


@contextmanager
def no_garbage() -> Iterator[None]:
    """Let no garbage be collected meanwhile, if it is collected at all."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def import_late(module: str, *, needed_for: str = "", install: str = "") -> ModuleType:
    """Import `module` now.

    Raises:
        ConfigError: if the package is not installed; names what needs it and the command that installs it.
    """
    try:
        with no_garbage():
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
            raise
        purpose = f" is needed for {needed_for} and" if needed_for else ""
        raise ConfigError(
            f"the package '{error.name}'{purpose} is not installed; run: {install or f'pip install {error.name}'}"
        ) from error
