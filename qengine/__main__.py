"""`python -m qengine` is the `qengine` command."""

import sys

from qengine.cli import main

if __name__ == "__main__":
    sys.exit(main())
