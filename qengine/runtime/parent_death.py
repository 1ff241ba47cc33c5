"""A child process that ends when its parent does, however the parent ended.

Two ways, since each has a gap: the kernel kills the child when the thread that started it ends (Linux, and not if the
parent was gone before), and a thread of the child watches the channel, whose other end closes with the parent (not
while the child is stopped). Invariant: neither lets the child clean up; what it holds belongs to nobody any more.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading

from qengine.runtime.channel import Channel

_PR_SET_PDEATHSIG = 1


def die_with(parent_pid: int, channel: Channel) -> None:
    """Have this process killed when `parent_pid`, which started it, ends or closes the other end of `channel`."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        _die()
    threading.Thread(target=_watch, args=(channel.fileno(),), name="qengine-parent", daemon=True).start()


def _watch(file: int) -> None:
    """Wait until the other end is closed; what arrives before is not looked at."""
    poll = select.poll()
    poll.register(file, 0)
    poll.poll()
    _die()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
