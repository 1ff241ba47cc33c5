"""Where log messages go: plain lines on standard error, so that standard output carries answers only.

Invariant: our own loggers speak at the chosen level, everybody else's from warnings up; what they quote of a file gives
no orders to a terminal. Nothing is set up at import.
"""

from __future__ import annotations

import logging
import re
import sys

from qengine.config import nearest
from qengine.errors import ConfigError

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_OWN_PACKAGES = ("qengine", "converters", "quant_kernels")


#: All but line feeds and tabs, and what turns the direction of writing.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def harmless(text: str) -> str:
    """Text whose control characters are spelled, as in "\\x1b", instead of obeyed."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return harmless(super().format(record))


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]
    """Our handler, told apart from others so that a second set-up replaces the first."""


def set_up_logging(level: str) -> None:
    """Send log messages to standard error from `level` up. May be called again to change the level.

    Raises:
        ConfigError: if there is no such level.
    """
    if level not in _LEVELS:
        raise ConfigError(
            f"QENGINE_LOG_LEVEL is '{level}', expected one of: {', '.join(_LEVELS)}{nearest(level, list(_LEVELS))}"
        )
    handler = _Handler(sys.stderr)
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S"))
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, _Handler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(max(_LEVELS[level], logging.WARNING))
    for package in _OWN_PACKAGES:
        logging.getLogger(package).setLevel(_LEVELS[level])


def level_name() -> str:
    """The level at which our loggers speak, as `set_up_logging` takes it."""
    level = logging.getLogger(_OWN_PACKAGES[0]).getEffectiveLevel()
    return next((name for name, value in _LEVELS.items() if value >= level), "error")
