"""`python -m qengine.runtime.rank FD PID`: the command that starts a rank. Its work is `rank_service`'s.

Invariant: torch is imported without the collector, which takes a tenth of a rank's start, and after SIGINT is ignored:
a rank ends when its engine says so. It lives in a session of its own, where no terminal's Ctrl-C comes.
"""

from __future__ import annotations

import signal
import sys

from qengine.imports import end_without_collecting, import_late


def main() -> int:
    """Serve the engine that the command line names and return the exit code, which ends the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code: int = import_late("qengine.runtime.rank_service").main(sys.argv[1:])
        return code
    finally:
        end_without_collecting()


if __name__ == "__main__":
    sys.exit(main())
