"""qengine itself, run in fresh processes through its public Python API."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import qengine
from benchmarks.engines.base import ModelFacts, SpeedReading, StartReading, Task
from benchmarks.process import run_python

WORKER = "benchmarks.engines.own_worker"


def describe_model(
    model: str | None, environment: Mapping[str, str], timeout_s: float, options: Mapping[str, Any] | None = None
) -> ModelFacts:
    """Open the model's headers in a worker.

    Args:
        options: of `LLM`, for loading.

    Raises:
        InputError: if there is no such model or qengine cannot load it.
    """
    record, _ = run_python(WORKER, "describe", {"model": model, "options": dict(options or {})}, environment, timeout_s)
    return ModelFacts(**{**record, "path": Path(record["path"])})


class OwnEngine:
    """qengine with its default options, but for those given, which are of `LLM`, for loading."""

    name = "qengine"
    label = "qengine"
    meaning: Mapping[str, str] = {
        "decode": "engine steps with every sequence running: scheduling, model, greedy sampling and detokenizing",
        "prompt": "from adding the request to its first sampled token; the prefix cache is on, the prompts differ",
        "start": "qengine.LLM(model).generate() of one token from text",
    }

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        self._options = dict(options or {})

    def __enter__(self) -> OwnEngine:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def problem(self, model: ModelFacts) -> str | None:
        return None

    def version(self) -> str:
        return qengine.__version__

    def prepare(self, task: Task) -> None:
        pass

    def start(self, task: Task) -> StartReading:
        _, result = run_python(WORKER, "start", task.worker_spec(), task.environment, task.timeout_s)
        return StartReading(result.first_output_seconds, result.peak_rss_bytes)

    def speed(self, task: Task, round_number: int) -> SpeedReading:
        spec = {**task.worker_spec(), "round": round_number, "options": self._options}
        record, result = run_python(WORKER, "speed", spec, task.environment, task.timeout_s)
        return speed_reading(record, result.peak_rss_bytes)


def speed_reading(record: Mapping[str, Any], peak_rss_bytes: int) -> SpeedReading:
    """A Python worker's answer as a reading; JSON has turned the batch sizes into strings."""
    return SpeedReading(
        prompt=record["prompt"],
        decode={int(batch): speed for batch, speed in record["decode"].items()},
        weight_bytes_per_token=record["weight_bytes_per_token"],
        kv_bytes_per_token=record["kv_bytes_per_token"],
        peak_rss_bytes=peak_rss_bytes,
    )
