"""`python -m tests.self_portrait CODE`: what a process sees of how it was started, as JSON; it ends with CODE."""

from __future__ import annotations

import gc
import json
import os
import signal
import stat
import sys
from pathlib import Path


def main() -> None:
    told = {
        "argv": sys.argv[1:],
        "name": Path(sys.argv[0]).name,
        "path": sys.path,
        "folder": os.getcwd(),
        "command line": Path("/proc/self/cmdline").read_bytes().rstrip(b"\0").decode(),
        "parent": os.getppid(),
        "session": _own_or(os.getsid(0)),
        "group": _own_or(os.getpgid(0)),
        "environment": dict(os.environ),
        "descriptors": {name: stat.S_IFMT(os.stat(int(name)).st_mode) for name in _descriptors()},
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)],
        "collector": (gc.isenabled(), gc.get_freeze_count() // 1000),
        "has torch": "torch" in sys.modules,
        "heard": sys.stdin.read(),
    }
    print(json.dumps(told))
    sys.exit(int(sys.argv[1]))


def _own_or(number: int) -> int | str:
    return "own" if number == os.getpid() else number


def _descriptors() -> list[str]:
    """The numbers of open descriptors, but for the folder's own."""
    return [name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")]


if __name__ == "__main__":
    main()
