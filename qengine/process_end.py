"""How a process ends: without Python's search for garbage in all of torch, which takes longer than many a command.

Invariant: what was written is flushed. Neither function is for a process that goes on.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import sys
from contextlib import suppress
from typing import NoReturn

from qengine.imports import thaw_objects


def skip_last_walk() -> None:
    """Have Python end without looking for garbage once more, which takes 0.2 s where torch is loaded.

    Not where triton is: its library counts what is left, and prints it.
    """
    if "triton" in sys.modules:
        thaw_objects()
        return
    gc.disable()
    gc.freeze()


def exit_now(code: int) -> NoReturn:
    """End at once: nothing is taken apart, and no library can hang while it is."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            # A stream that is closed, or that nobody reads any more.
            with suppress(OSError, ValueError):
                stream.flush()
    ctypes.CDLL(None).fflush(None)  # What libraries have printed.
    os._exit(code)
