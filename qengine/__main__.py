"""The `qengine` command, also as `python -m qengine`. It imports nothing before Ctrl-C is taken care of."""

from __future__ import annotations

import sys

from qengine.imports import import_late
from qengine.interrupts import leave_at_once


def main() -> int:
    """Run the command line and return the exit code, which ends the process."""
    leave_at_once()
    try:
        code: int = import_late("qengine.cli").main()
        return code
    finally:
        import_late("qengine.process_end").skip_last_walk()


if __name__ == "__main__":
    sys.exit(main())
