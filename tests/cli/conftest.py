"""What every test of the command line starts from: none of our environment variables, and untouched logging."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _clean_surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("QENGINE_LOG_LEVEL", "QENGINE_API_KEY", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    root = logging.getLogger()
    handlers = list(root.handlers)
    loggers = [root, *(logging.getLogger(name) for name in ("qengine", "converters", "quant_kernels"))]
    levels = [logger.level for logger in loggers]
    yield
    root.handlers[:] = handlers
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
