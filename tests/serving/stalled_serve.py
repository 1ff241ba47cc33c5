"""`python -m tests.serving.stalled_serve WORDS...`: the command `qengine WORDS`, whose model never comes to be loaded.

Of several ranks the second is stopped while it loads.
"""

from __future__ import annotations

import sys
import threading
from functools import partial
from typing import Any

from qengine import cli, engine
from qengine.interrupts import leave_at_once
from qengine.runtime.worker import Worker

FAILING_RANK = (sys.executable, "-m", "tests.runtime.failing_rank", "1", "stop")


def _load(self: Worker, **_: Any) -> None:
    threading.Event().wait()


if __name__ == "__main__":
    leave_at_once()
    Worker.load = _load  # type: ignore[assignment,method-assign]
    engine.start_parts = partial(engine.start_parts, rank_command=FAILING_RANK)
    sys.exit(cli.main(sys.argv[1:]))
