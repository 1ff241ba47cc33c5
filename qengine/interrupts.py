"""Ctrl-C while a command is still being imported, which takes seconds.

The exception that Python raises then may come up inside of an import that takes it for something else, or in a place
where exceptions are only printed, and the command would run on. Invariant: from `leave_at_once` to `raise_as_usual`,
when nothing has been begun yet, Ctrl-C ends the process. What runs later decides for itself.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

EXIT_INTERRUPTED = 130


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(EXIT_INTERRUPTED)


def leave_at_once() -> None:
    """Have Ctrl-C end the process, unless somebody has said already what it does. For the main thread."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def raise_as_usual() -> None:
    """Have Ctrl-C raise KeyboardInterrupt again, if it was `leave_at_once` that has changed it."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
