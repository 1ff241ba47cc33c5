"""One rank in a process of its own: `python -m tests.parallel.staged_rank TASK LIMIT_S SEAT`.

It says "ready" and waits for a line before it does its task, so that no rank is late because of its imports. Everything
it answers is JSON, a line each.
"""

from __future__ import annotations

import hashlib
import json
import sys

import torch

from qengine.errors import TransportError
from qengine.parallel.host_staged import HostStagedTransport
from qengine.parallel.seats import Seat
from qengine.process_end import exit_now
from tests.parallel.exchanges import DTYPES, inputs_of

#: Calls that are made before a rank says that it is under way.
WARM_CALLS = 20


def digests(transport: HostStagedTransport) -> None:
    """A hash of what all_reduce gives for every type and some sizes, in one slot and in several."""
    found = {}
    for dtype in DTYPES:
        for count in (1, 577, 100_000):
            x = transport.all_reduce(inputs_of(transport.size, (count,), dtype)[transport.rank])
            found[f"{dtype} {count}"] = hashlib.sha256(x.view(torch.uint8).numpy().tobytes()).hexdigest()
    answer(found)


def loop(transport: HostStagedTransport) -> None:
    """Collectives until one fails."""
    num_calls = 0
    try:
        while True:
            transport.all_reduce(torch.ones(5000))
            num_calls += 1
            if num_calls == WARM_CALLS:
                answer({"under_way": True})
    except TransportError as error:
        answer({"error": str(error), "rank": error.rank})


def answer(record: object) -> None:
    print(json.dumps(record), flush=True)


def main() -> None:
    task, limit_s, seat = sys.argv[1:]
    torch.set_num_threads(1)
    transport = HostStagedTransport(Seat.from_text(seat), limit_s=float(limit_s))
    answer({"ready": True})
    sys.stdin.readline()
    {"digests": digests, "loop": loop}[task](transport)
    transport.close()


if __name__ == "__main__":
    main()
    exit_now(0)
