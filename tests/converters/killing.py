"""Ends this process by SIGKILL at the n-th time that it touches the disk, in processes that are cheap to start.

A server process imports everything once and forks a child for each run.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.converters.killing_preload"])
#: What changes a file or a name.
_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


class _Counter:
    """An audit hook: counts changes below `folder`, and at number `last` there is no more process."""

    def __init__(self, folder: Path, last: int | None) -> None:
        self.count = 0
        self._folder = str(folder)
        self._last = last

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _EVENTS or self._folder not in repr(tuple(map(_said, arguments))):
            return
        self.count += 1
        if self.count == self._last:
            os.kill(os.getpid(), signal.SIGKILL)


def _said(argument: Any) -> Any:
    """A folder that is given by its descriptor, by its name, as `shutil.rmtree` removes what is in it."""
    if isinstance(argument, int) and argument > 2:
        with contextlib.suppress(OSError):
            return os.readlink(f"/proc/self/fd/{argument}")
    return argument


def _child(work: Callable[..., object], arguments: tuple[Any, ...], folder: Path, last: int | None, pipe: Any) -> None:
    counter = _Counter(folder, last)
    sys.addaudithook(counter)
    # What pwrite does raises no audit event.
    pwrite = os.pwrite

    def counted(descriptor: int, data: Any, offset: int) -> int:
        counter("open", (str(folder),))
        return pwrite(descriptor, data, offset)

    os.pwrite = counted
    work(*arguments)
    pipe.send(counter.count)


def run_until(work: Callable[..., object], arguments: tuple[Any, ...], folder: Path, last: int | None) -> int | None:
    """Run ``work(*arguments)`` in a process of its own that dies at its `last` change below `folder`.

    Returns:
        How many changes there were, or None if it was killed.
    """
    receiving, sending = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_child, args=(work, arguments, folder, last, sending))
    process.start()
    sending.close()
    try:
        count: int | None = receiving.recv()
    except EOFError:
        count = None
    process.join(60)
    if count is None:
        assert process.exitcode == -signal.SIGKILL, "it ended by itself, and not well"
    else:
        assert process.exitcode == 0
    return count
