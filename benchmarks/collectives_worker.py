"""One rank of `benchmarks.collectives`: `python -m benchmarks.collectives_worker SPEC`, started by it alone.

Rank 0 answers one JSON line with the seconds of an all_reduce of each shape.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common import answer, take_stdout
from qengine.parallel.distributed import connect
from qengine.parallel.host_staged import HostStagedTransport
from qengine.parallel.seats import Seat
from qengine.parallel.transport import Transport

_LIMIT_S = 120.0


def main() -> int:
    """Time what the command line asks for."""
    channel = take_stdout()
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    transport = join(spec)
    try:
        seconds = [time_all_reduce(transport, rows, spec) for rows in spec["shapes"]]
    finally:
        transport.close()
    if transport.rank == 0:
        answer(channel, {"seconds": seconds})
    return 0


def join(spec: dict[str, Any]) -> Transport:
    """The transport that the spec names."""
    if spec["transport"] == "host-staged":
        return HostStagedTransport(Seat.from_text(spec["seat"]), _LIMIT_S)
    store = dist.FileStore(spec["meeting_file"], spec["size"])
    return connect("gloo", store, spec["rank"], spec["size"], _LIMIT_S)


def time_all_reduce(transport: Transport, shape: tuple[int, int], spec: dict[str, Any]) -> float:
    """Seconds of one call, over many in a row after some that are not counted."""
    x = torch.zeros(*shape, dtype=getattr(torch, spec["dtype"]))
    for _ in range(spec["warm_calls"]):
        transport.all_reduce(x)
    begun = time.perf_counter()
    for _ in range(spec["calls"]):
        transport.all_reduce(x)
    return (time.perf_counter() - begun) / spec["calls"]


if __name__ == "__main__":
    sys.exit(main())
