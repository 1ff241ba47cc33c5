"""What an all_reduce between ranks on this machine's CPU costs: `python -m benchmarks.collectives`.

Host-staged transport beside gloo, for the activations of one decode step (rows x hidden size). The two take turns in
fresh processes; the figure is the median of the rounds, and a ratio above 1 means that host-staged is faster. Prints a
table and writes JSON. It measures no GPU.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import REPOSITORY, BenchmarkError, Spread, check_writable, write_text
from benchmarks.machine import environment_record, publishable
from benchmarks.process import child_environment
from qengine.parallel import children
from qengine.parallel.seats import Seats

DEFAULT_JSON = REPOSITORY / "benchmarks" / "results" / "collectives-cpu.json"
TRANSPORTS = ("host-staged", "gloo")
SHAPES = tuple((rows, hidden) for hidden in (576, 2048, 4096, 8192) for rows in (1, 8, 64))
_WORKER = "benchmarks.collectives_worker"
_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured. `calls` are timed together after `warm_calls`; each of `rounds` has fresh processes."""

    size: int
    dtype: str = "float32"
    shapes: Sequence[tuple[int, int]] = SHAPES
    calls: int = 300
    warm_calls: int = 50
    rounds: int = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, 1 if a measurement failed, or 2 for wrong input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parse(arguments)
    plan = Plan(options.ranks, options.dtype, rounds=options.rounds, calls=options.calls)
    try:
        check_writable(options.json)
        rows = measure(plan)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(table(plan, rows), end="")
    command = shlex.join(["python", "-m", "benchmarks.collectives", *publishable(arguments)])
    record = {
        "benchmark": "collectives",
        "environment": environment_record(command),
        "ranks": plan.size,
        "dtype": plan.dtype,
        "calls": plan.calls,
        "all_reduce": rows,
    }
    write_text(options.json, json.dumps(record, indent=1) + "\n")
    return 0


def measure(plan: Plan) -> list[dict[str, Any]]:
    """One record for each shape: seconds of a call by transport, and their ratio.

    Raises:
        BenchmarkError: a rank failed.
    """
    seconds: dict[str, list[list[float]]] = {name: [] for name in TRANSPORTS}
    for _ in range(plan.rounds):
        for name in TRANSPORTS:
            seconds[name].append(run_ranks(plan, name))
    rows = []
    for index, (num_rows, hidden) in enumerate(plan.shapes):
        spreads = {name: Spread.of([run[index] for run in runs]) for name, runs in seconds.items()}
        ratio = spreads["gloo"].median / spreads["host-staged"].median
        row = {"rows": num_rows, "hidden": hidden, "gloo_over_host_staged": ratio}
        rows.append({**row, **{f"{name}_seconds": spread.to_json() for name, spread in spreads.items()}})
    return rows


def run_ranks(plan: Plan, transport: str) -> list[float]:
    """Seconds of a call for each shape, by one set of processes.

    Raises:
        BenchmarkError: a rank failed or took too long.
    """
    spec = {
        "transport": transport,
        "size": plan.size,
        "dtype": plan.dtype,
        "threads": 1,
        "shapes": list(plan.shapes),
        "calls": plan.calls,
        "warm_calls": plan.warm_calls,
    }
    with ExitStack() as stack:
        seats = stack.enter_context(Seats(plan.size))
        meeting = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "meeting"
        processes: list[subprocess.Popen[bytes]] = []
        stack.callback(children.end, processes)
        for seat in seats:
            of_rank = {**spec, "rank": seat.rank, "seat": seat.to_text(), "meeting_file": str(meeting)}
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", _WORKER, json.dumps(of_rank)],
                    stdout=subprocess.PIPE,
                    env=child_environment(1),
                    pass_fds=seat.fds,
                    start_new_session=True,
                )
            )
        seats.close()
        return _answer_of(processes)


def _answer_of(processes: Sequence[subprocess.Popen[bytes]]) -> list[float]:
    try:
        outputs = [process.communicate(timeout=_TIMEOUT_S)[0] for process in processes]
    except subprocess.TimeoutExpired as error:
        raise BenchmarkError(f"ranks did not finish in {_TIMEOUT_S:.0f} s") from error
    failed = [(rank, process.returncode) for rank, process in enumerate(processes) if process.returncode != 0]
    if failed:
        rank, code = failed[0]
        raise BenchmarkError(f"rank {rank} {children.how_it_ended(code)}; see its output above")
    seconds: list[float] = json.loads(outputs[0])["seconds"]
    return seconds


def table(plan: Plan, rows: Sequence[dict[str, Any]]) -> str:
    """The table that people read."""
    lines = [f"all_reduce of {plan.dtype} over {plan.size} ranks, microseconds per call, median of {plan.rounds}", ""]
    lines.append(f"{'rows x hidden':>14}{'host-staged':>14}{'gloo':>10}{'gloo / host-staged':>21}")
    for row in rows:
        staged, gloo = (row[f"{name}_seconds"]["median"] * 1e6 for name in TRANSPORTS)
        shape = f"{row['rows']} x {row['hidden']}"
        lines.append(f"{shape:>14}{staged:>14.0f}{gloo:>10.0f}{row['gloo_over_host_staged']:>20.1f}x")
    return "\n".join(lines) + "\n"


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.collectives", description="What an all_reduce between ranks on the CPU costs."
    )
    parser.add_argument("--ranks", type=int, default=2, choices=range(2, 9), metavar="N", help="(%(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="(%(default)s)")
    parser.add_argument("--calls", type=int, default=300, metavar="N", help="timed in a row (%(default)s)")
    parser.add_argument("--json", type=Path, default=DEFAULT_JSON, metavar="FILE", help="where results go")
    options = parser.parse_args(arguments)
    for name in ("rounds", "calls"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}, expected at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
