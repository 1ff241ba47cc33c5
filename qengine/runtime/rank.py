"""`python -m qengine.runtime.rank FD PID`: the command that starts a rank. Its work is `rank_service`'s.

Invariant: nothing is imported before Ctrl-C is taken care of. In a terminal it is for the engine, which then stops its
ranks: one that still imports must not end by itself.
"""

from __future__ import annotations

import signal
import sys

from qengine.imports import import_late


def main() -> int:
    """Serve the engine that the command line names and return the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    code: int = import_late("qengine.runtime.rank_service").main(sys.argv[1:])
    return code


if __name__ == "__main__":
    sys.exit(main())
