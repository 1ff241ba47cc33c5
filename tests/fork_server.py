"""`python -m tests.fork_server SOCKET PADDING`: forks processes that have torch already. `tests.forking` asks for them.

A request is a JSON object and the descriptors 0, 1, 2 and those to pass on; its answer is a process id. Invariant: what
runs in a forked process sees the command line, environment, descriptors and session that it was asked with, and is no
child of this process but of the one that asked, which must take in orphans (PR_SET_CHILD_SUBREAPER) while it waits.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import json
import os
import runpy
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch  # noqa: F401 - what every one of them would import

LARGEST_REQUEST = 1 << 17
MOST_DESCRIPTORS = 64
#: Above all numbers at which descriptors are wanted.
_OUT_OF_THE_WAY = 512
#: Places in /proc/PID/stat after the name: where the command line begins and ends in memory.
_ARG_START, _ARG_END = 45, 46


def main() -> None:
    """Answer requests until the other end is closed; in a forked process, do what was asked and return."""
    control = socket.socket(fileno=int(sys.argv[1]))
    gc.freeze()
    while True:
        request, descriptors, _, _ = socket.recv_fds(control, LARGEST_REQUEST, MOST_DESCRIPTORS)
        if not request:
            return
        child = _fork()
        if child is None:
            control.detach()
            _become(json.loads(request), descriptors)
            return
        for descriptor in descriptors:
            os.close(descriptor)
        control.send(str(child).encode())


def _fork() -> int | None:
    """Fork a process whose parent is gone. Returns its id, or None in it, once it has another parent."""
    told, tell = os.pipe()
    until, hold = os.pipe()
    between = os.fork()
    if between == 0:
        child = os.fork()
        if child:
            os.write(tell, str(child).encode())
            os._exit(0)
        os.close(hold)
        os.read(until, 1)
        return None
    os.waitpid(between, 0)
    child = int(os.read(told, 32))
    for descriptor in (told, tell, until, hold):
        os.close(descriptor)
    return child


def _become(asked: dict[str, Any], descriptors: Sequence[int]) -> None:
    """Be the process that was asked for, and run its module."""
    if asked["start_new_session"]:
        os.setsid()
    _place(descriptors, [0, 1, 2, *asked["pass_fds"]])
    os.environ.clear()
    os.environ.update(asked["environment"])
    module, *words = asked["words"]
    _show([sys.executable, "-m", module, *words])
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _place(descriptors: Sequence[int], places: Sequence[int]) -> None:
    """Move each descriptor to its place, and close all others."""
    aside = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, _OUT_OF_THE_WAY) for descriptor in descriptors]
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
