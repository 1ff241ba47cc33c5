"""Engines taking turns: who can run, a warm-up, the rounds, and each one's part of the results.

Invariant: every engine that counts has the same number of rounds, and one that dropped out is listed with its reason.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.common import BenchmarkError, InputError, Spread, Workload
from benchmarks.engines.base import EngineUnderTest, SpeedReading, StartReading, Task
from benchmarks.machine import CpuClock
from benchmarks.process import run_python
from benchmarks.report import MEASURED, OWN


@dataclass(slots=True)
class Entry:
    """One engine's part of the results, as it grows."""

    engine: EngineUnderTest
    reason: str | None = None
    version: str | None = None
    starts: list[StartReading] = field(default_factory=list)
    speeds: list[SpeedReading] = field(default_factory=list)

    @property
    def is_running(self) -> bool:
        return self.reason is None


def compete(engines: Sequence[EngineUnderTest], task: Task, required: Sequence[str]) -> dict[str, Any]:
    """Measure the machine, then every engine in turn, as many rounds as the workload says.

    Args:
        required: names of the peers that must be measured.

    Returns:
        "bound", "disturbance" and "engines" of the results.

    Raises:
        InputError: if a required peer cannot run; BenchmarkError: if ours or a required one fails.
    """
    entries = [Entry(engine) for engine in engines]
    check_entries(entries, task, required)
    bound = probe_machine(task)
    warm_up(entries, task, required)
    clock, runs = CpuClock.read(), task.workload.runs
    shares = [run_round(f"round {n + 1}/{runs}", n, entries, task, required) for n in range(runs)]
    disturbance = {"foreign_cpu_share": clock.foreign_share(CpuClock.read()), "foreign_cpu_share_by_round": shares}
    return {
        "bound": better_of(bound, probe_machine(task)),
        "disturbance": disturbance,
        "engines": [entry_record(entry, task.workload) for entry in entries],
    }


def check_entries(entries: Sequence[Entry], task: Task, required: Sequence[str]) -> None:
    """Ask each engine whether it can run this model.

    Raises:
        InputError: if a required one cannot.
    """
    for entry in entries:
        entry.reason = entry.engine.problem(task.model)
        if entry.reason is None:
            entry.version = entry.engine.version()
        elif entry.engine.name in required:
            raise InputError(f"{entry.engine.name} is required but {entry.reason}")
        else:
            say(f"{entry.engine.name}: {entry.reason}")


def probe_machine(task: Task) -> dict[str, Any]:
    """The machine's bound, from benchmarks.probe in a process of its own."""
    say("measuring the machine's bound")
    spec = {"threads": task.workload.threads}
    return run_python("benchmarks.probe", "measure", spec, task.environment, task.timeout_s)[0]


def better_of(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The higher of two probes' rates: what a machine did once it can do."""
    rates = {k: max(v, second["matmul_flop_per_s"][k]) for k, v in first["matmul_flop_per_s"].items()}
    read = max(first["read_bytes_per_s"], second["read_bytes_per_s"])
    return {**first, "read_bytes_per_s": read, "matmul_flop_per_s": rates}


def warm_up(entries: Sequence[Entry], task: Task, required: Sequence[str]) -> None:
    """Prepare each engine and start it once, uncounted: files are in the page cache, and failures show early."""
    for entry in _running(entries):
        say(f"warm-up: {entry.engine.name}")
        with _Failure(entry, required):
            entry.engine.prepare(task)
            entry.engine.start(task)


def run_round(title: str, number: int, entries: Sequence[Entry], task: Task, required: Sequence[str]) -> float:
    """One turn of every engine; returns the share of the cores that others took meanwhile."""
    clock = CpuClock.read()
    for entry in _running(entries):
        with _Failure(entry, required):
            start = entry.engine.start(task)
            speed = entry.engine.speed(task, number)
            entry.starts.append(start)
            entry.speeds.append(speed)
            decode = ", ".join(f"decode {b}: {v:.1f}" for b, v in speed.decode.items())
            figures = f"{decode}, prompt: {speed.prompt:.1f} tok/s, first token: {start.first_token_s:.2f} s"
            say(f"{title}: {entry.engine.name}: {figures}")
    return clock.foreign_share(CpuClock.read())


def _running(entries: Sequence[Entry]) -> list[Entry]:
    return [entry for entry in entries if entry.is_running]


class _Failure:
    """A peer that fails is out of the race, with its reason in the results; ours or a required one ends it."""

    def __init__(self, entry: Entry, required: Sequence[str]) -> None:
        self._entry = entry
        self._is_fatal = entry.engine.name in (OWN, *required)

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        if not isinstance(error, BenchmarkError) or self._is_fatal:
            return False
        self._entry.reason = f"failed: {error}"
        say(f"{self._entry.engine.name}: {self._entry.reason}")
        return True


def entry_record(entry: Entry, workload: Workload) -> dict[str, Any]:
    """One engine in the JSON. A peer that failed half-way has no results: rounds must be equal in number."""
    status, _, _ = (entry.reason or MEASURED).partition(":")
    record: dict[str, Any] = {
        "name": entry.engine.name,
        "label": entry.engine.label,
        "version": entry.version,
        "status": status,
        "reason": entry.reason,
        "meaning": dict(entry.engine.meaning),
    }
    if not entry.is_running:
        return record
    last = entry.speeds[-1]
    readings: dict[str, list[float]] = {
        **{f"decode_{b}": [s.decode[b] for s in entry.speeds] for b in workload.batches},
        "prompt": [s.prompt for s in entry.speeds],
        "first_token": [s.first_token_s for s in entry.starts],
        "peak_memory": [s.peak_rss_bytes for s in entry.starts],
        "peak_memory_speed_test": [s.peak_rss_bytes for s in entry.speeds],
    }
    return {
        **record,
        "weight_bytes_per_token": last.weight_bytes_per_token,
        "kv_bytes_per_token": last.kv_bytes_per_token,
        "results": {key: Spread.of(values).to_json() for key, values in readings.items()},
    }


def say(text: str) -> None:
    """Progress goes to stderr: stdout is the report."""
    print(text, file=sys.stderr, flush=True)
