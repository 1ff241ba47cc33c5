"""How a process ends: without Python's search for garbage in all of torch, which takes longer than many a command.

Invariant: what was written is flushed. Neither is for a process that goes on, such as one that only calls `main`.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
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
        try:
            stream.flush()
        except OSError:
            continue  # Nobody reads it any more.
    os._exit(code)
