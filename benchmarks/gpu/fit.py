"""Whether a model runs in the memory that was planned for it, on one rank or on several that share this card.

Ranks are processes of `fit_rank`, each held to the memory of a smaller card. NCCL refuses two ranks on one card, so
they hand each other tensors through host memory: their tokens per second are those of that way, not of two cards. What
this shows is memory, to the byte: the peak of every rank against its plan, while the cache is full.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from benchmarks.common import REPOSITORY
from benchmarks.gpu.models import CONFIGS, Config
from benchmarks.gpu.workloads import Fit
from qengine.parallel import children
from qengine.parallel.seats import Seats

RANK_COMMAND = (sys.executable, "-m", "benchmarks.gpu.fit_rank")
#: A little less than a part may take, so that what went wrong is told.
TIMEOUT_S = 440.0
#: How far below its plan a peak may stay: a part of it, or so many bytes where that is more.
SLACK, SLACK_BYTES = 0.03, 256 * 2**20


def records(spec: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What the GPU's worker answers for a spec."""
    workload = Fit.from_json(spec["workload"])
    found = measure(workload, CONFIGS[workload.model])
    yield from found
    problems = [problem for record in found for problem in faults(record)]
    if len({record["tokens_digest"] for record in found}) > 1:
        problems.append("ranks sampled different tokens")
    if problems:
        raise SystemExit(f"{workload.model} on {workload.ranks} ranks: {'; '.join(problems)}")


def measure(workload: Fit, config: Config, command: Sequence[str] = RANK_COMMAND) -> list[dict[str, Any]]:
    """A record of every rank."""
    with ExitStack() as stack:
        seats = list(stack.enter_context(Seats(workload.ranks))) if workload.ranks > 1 else []
        processes: list[subprocess.Popen[bytes]] = []
        stack.callback(children.end, processes)
        for rank in range(workload.ranks):
            seat = seats[rank] if seats else None
            spec = {
                "workload": workload.to_json(),
                "config": dict(config),
                "seat": None if seat is None else seat.to_text(),
            }
            processes.append(
                subprocess.Popen(
                    [*command, json.dumps(spec)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    pass_fds=() if seat is None else seat.fds,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    cwd=REPOSITORY,
                    start_new_session=True,
                )
            )
        return [_record_of(rank, process) for rank, process in enumerate(processes)]


def faults(record: Mapping[str, Any]) -> list[str]:
    """What is wrong with a rank's memory; nothing where no card was measured."""
    peak, planned = record["peak_reserved"], record["planned_bytes"]
    if peak is None:
        return []
    if peak > planned:
        return [f"rank {record['rank']} took {peak - planned} bytes more than planned"]
    if planned - peak > max(SLACK * planned, SLACK_BYTES):
        return [f"rank {record['rank']} left {planned - peak} of the {planned} bytes planned unused"]
    return []


def _record_of(rank: int, process: subprocess.Popen[bytes]) -> dict[str, Any]:
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise SystemExit(f"rank {rank} did not end within {TIMEOUT_S:g} s") from None
    if process.returncode != 0:
        raise SystemExit(f"rank {rank} {children.how_it_ended(process.returncode)}; see above")
    record: dict[str, Any] = json.loads(output.splitlines()[-1])
    return record
