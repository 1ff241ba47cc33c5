"""The engine alone, for comparison: the same requests as a batch in a process of its own, without HTTP.

    python -m benchmarks.serving.reference MODEL-OR-EMPTY MAX-NUM-SEQS CONTEXT

The worker takes a line of JSON for each batch and answers with one, so that it can take turns with a server on the same
core: while it waits for a line it costs nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from benchmarks.common import WORKER_ERROR, BenchmarkError, answer, take_stdout
from benchmarks.process import child_environment
from benchmarks.serving.servers import pinned
from qengine.bench.load import LoadRequest
from qengine.config import EngineConfig
from qengine.engine import Engine
from qengine.errors import QEngineError
from qengine.request import SamplingParams


@dataclass(frozen=True, slots=True)
class BatchReading:
    """One batch. `first_text_s` is when the first text was there, all in seconds from when the batch was given."""

    seconds: float
    cpu_seconds: float
    first_text_s: float
    num_tokens: int


class Reference:
    """The worker's parent side."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, requests: Sequence[LoadRequest]) -> BatchReading:
        """Answer `requests` as one batch. Raises BenchmarkError."""
        assert self._process.stdin is not None
        lines = [[list(request.prompt), request.max_tokens] for request in requests]
        self._process.stdin.write(json.dumps(lines) + "\n")
        self._process.stdin.flush()
        return BatchReading(**self._answer())

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise BenchmarkError(f"the engine's process ended with code {self._process.wait()}")
        record: dict[str, Any] = json.loads(line)
        if WORKER_ERROR in record:
            raise BenchmarkError(f"the engine alone: {record[WORKER_ERROR]}")
        return record


@contextmanager
def reference(cpu: int, model: str | None, max_num_seqs: int, context: int) -> Iterator[Reference]:
    """An engine on `cpu`, loaded."""
    command = [sys.executable, "-m", "benchmarks.serving.reference", model or "", str(max_num_seqs), str(context)]
    with pinned(cpu):
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=child_environment(1),
            text=True,
            start_new_session=True,
        )
    try:
        worker = Reference(process)
        worker._answer()
        yield worker
    finally:
        process.kill()
        process.wait()


# The worker's side


def main() -> int:
    channel = take_stdout()
    model, max_num_seqs, context = sys.argv[1] or None, int(sys.argv[2]), int(sys.argv[3])
    try:
        options = {"model": model, "max_num_seqs": max_num_seqs, "max_model_len": context}
        engine = Engine.start(EngineConfig.from_options(options))
        answer(channel, {})
        _serve(engine, channel)
    except QEngineError as error:
        answer(channel, {WORKER_ERROR: str(error)})
        return 1
    return 0


def _serve(engine: Engine, channel: IO[str]) -> None:
    for number, line in enumerate(sys.stdin):
        answer(channel, _batch(engine, number, json.loads(line)))  # type: ignore[arg-type]


def _batch(engine: Engine, number: int, lines: list[tuple[list[int], int]]) -> dict[str, Any]:
    began, cpu_began = time.perf_counter(), time.process_time()
    for index, (prompt, max_tokens) in enumerate(lines):
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        engine.add(engine.make_request(f"{number}-{index}", prompt, params))
    first_text_s, num_tokens = 0.0, 0
    while engine.has_unfinished:
        for output in engine.step():
            if not first_text_s and output.outputs[0].text:
                first_text_s = time.perf_counter() - began
            if output.finished:
                num_tokens += len(output.outputs[0].token_ids)
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu_began,
        "first_text_s": first_text_s,
        "num_tokens": num_tokens,
    }


if __name__ == "__main__":
    sys.exit(main())
