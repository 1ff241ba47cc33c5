"""`python -m tests.fork_server SOCKET PADDING`: forks processes that have torch already. `tests.forking` asks for them.

It says "ready" once. A request is a JSON object and the descriptors 0, 1, 2 and those to pass on; its answer is a
process id. Invariant: when the answer is given, the forked process has the command line, environment, descriptors,
session and ignored signals that were asked for, and is a child of the process that asked, which must take in orphans
(PR_SET_CHILD_SUBREAPER) while it waits.
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib
import json
import os
import runpy
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LARGEST_REQUEST = 1 << 17
MOST_DESCRIPTORS = 64
#: The command line is written over the server's, which PADDING makes long enough.
LONGEST_COMMAND = 4000
READY = b"ready"
#: Above all numbers at which descriptors are wanted.
ASIDE = 512
#: Places in /proc/PID/stat after the name: where the command line begins and ends in memory.
_ARG_START, _ARG_END = 45, 46


def main() -> None:
    """Answer requests until the other end is closed; in a forked process, do what was asked and return."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # It ends with those who ask, not before.
    control = socket.socket(fileno=int(sys.argv[1]))
    importlib.import_module("torch")
    control.send(READY)
    while True:
        request, descriptors, _, _ = socket.recv_fds(control, LARGEST_REQUEST, MOST_DESCRIPTORS)
        if not request:
            return
        told, tell = os.pipe()
        if _fork_an_orphan():
            control.detach()
            _become(json.loads(request), descriptors, tell)
            return
        os.close(tell)
        control.send(os.read(told, 32))
        for descriptor in (told, *descriptors):
            os.close(descriptor)


def _fork_an_orphan() -> bool:
    """Fork a process whose parent is gone. True in it, once it has its new parent; False here, when it may have."""
    until, hold = os.pipe()
    between = os.fork()
    if between == 0:
        if os.fork():
            os._exit(0)
        os.close(hold)
        os.read(until, 1)
        return True
    os.waitpid(between, 0)
    os.close(until)
    os.close(hold)
    return False


def _become(asked: dict[str, Any], descriptors: Sequence[int], tell: int) -> None:
    """Be the process that was asked for, say so, and run its module."""
    if asked["start_new_session"]:
        os.setsid()
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        usual = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
        signal.signal(signal.Signals[name], signal.SIG_IGN if name in asked["ignored"] else usual)
    os.environ.clear()
    os.environ.update(asked["environment"])
    module, *words = asked["words"]
    _show([sys.executable, "-m", module, *words])
    sys.argv = [module, *words]
    _place([*descriptors, tell], [0, 1, 2, *asked["pass_fds"], ASIDE - 1])
    os.write(ASIDE - 1, str(os.getpid()).encode())
    os.close(ASIDE - 1)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _place(descriptors: Sequence[int], places: Sequence[int]) -> None:
    """Move each descriptor to its place, and close all others."""
    assert max(places) < ASIDE
    aside = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, ASIDE) for descriptor in descriptors]
    for descriptor, place in zip(aside, places, strict=True):
        os.dup2(descriptor, place)
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in places:
            try:
                os.close(int(name))
            except OSError:
                continue  # The folder's own, which is gone.


def _show(command: Sequence[str]) -> None:
    """Make `command` what /proc/self/cmdline says."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[_ARG_START]), int(fields[_ARG_END])
    text = b"\0".join(word.encode() for word in command)
    assert len(text) < end - start, "the padding is too short"
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, text, len(text))


if __name__ == "__main__":
    main()
