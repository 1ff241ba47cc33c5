"""The one place that imports a package late: packages that are heavy or optional.

Invariant: a missing package becomes a ConfigError with the exact install line. It does not cache: Python does.
While modules are imported and models are loaded nothing that is made is garbage, so `no_garbage` spares Python's
collector its walks through all of torch: a sixth of the time that importing it takes. What is alive after a start stays
so as long as the process serves: `freeze_live_objects` takes it out of every later walk.
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


def freeze_live_objects() -> None:
    """Collect what is garbage and look no more at what is alive, which is meant to live as long as the process.

    A walk through all of torch lets no other thread run for a tenth of a second, and for half of one where a step
    computes on the same core. For the time that a process serves; `thaw_objects` ends it.
    """
    gc.collect()
    gc.freeze()


def thaw_objects() -> None:
    """Have the collector look at everything again: what a start made is no longer needed."""
    gc.unfreeze()


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
