"""Ending child processes for good, with everything that they started.

Invariant: only processes that the caller has started and not yet reaped are signalled, so an id that the system has
given to somebody else meanwhile is never hit.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterable

#: How long the kernel may take to end a process that was killed; one that waits for a device can take a while.
REAP_SECONDS = 5.0


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a child, and its whole group if it leads one. Does not wait."""
    if process.poll() is not None:
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def end(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """Kill children and reap them. One that the kernel cannot end in time is left to it."""
    processes = list(processes)
    for process in processes:
        kill(process)
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(REAP_SECONDS)


def how_it_ended(code: int) -> str:
    """An exit code in words: "ended with exit code 1", "was ended by SIGSEGV"."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
