"""Waiting in tests for what comes in its own time."""

from __future__ import annotations

import time
from collections.abc import Callable

#: Longer than anything takes on a busy machine that also stops for seconds: a test that reaches it has hung.
WAIT_SECONDS = 60.0
_POLL_SECONDS = 0.005


def wait_until(condition: Callable[[], bool], seconds: float = WAIT_SECONDS) -> float:
    """Seconds until `condition` came true; fails after `seconds`."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds, f"it did not come true in {seconds:g} s"
        time.sleep(_POLL_SECONDS)
    return time.monotonic() - begin
