"""A rank that never meets the others: `python -m tests.runtime.stalled_rank RANK`, then what any rank is given."""

from __future__ import annotations

import sys
import time
from typing import Any

from qengine.process_end import exit_now
from qengine.runtime import rank_service as rank
from qengine.runtime.messages import Start
from qengine.runtime.rank import open_channel


def main(bad_rank: int, rest: list[str]) -> int:
    real = rank._connect

    def connect(start: Start, *arguments: Any) -> Any:
        if start.rank == bad_rank:
            print("stalled", flush=True)
            # As in a library that hangs: nothing can interrupt it.
            while True:
                time.sleep(600)
        return real(start, *arguments)

    rank._connect = connect
    return rank.main(open_channel(*map(int, rest)))


if __name__ == "__main__":
    exit_now(main(int(sys.argv[1]), sys.argv[2:]))
