"""`python -m qengine.runtime.rank FD PID`: the command that starts a rank. Its work is `rank_service`'s.

Invariant: torch is imported without the collector, which takes a tenth of a rank's start, and after SIGINT is ignored:
a rank ends when its engine says so. It lives in a session of its own, where no terminal's Ctrl-C comes. It ends without
clean-up, in which a library could hang: `rank_service` has given back what others wait for.
"""

from __future__ import annotations

import signal
import sys

from qengine.imports import import_late


def main() -> None:
    """Serve the engine that the command line names, and end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    code: int = import_late("qengine.runtime.rank_service").main(sys.argv[1:])
    import_late("qengine.process_end").exit_now(code)


if __name__ == "__main__":
    main()
