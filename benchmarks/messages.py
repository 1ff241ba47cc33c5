"""What it costs to hand a decode step to a rank and to take its answer: `python -m benchmarks.messages`.

Microseconds, medians over steps, in this process: writing and reading of messages alone, without sockets.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from qengine.request import SamplingParams
from qengine.runtime.messages import Result, Step, decode_order, decode_report, encode
from qengine.runtime.step_messages import StepReader, StepWriter, read_result, write_result
from qengine.scheduling.batch import Batch, BatchEntry, SampledToken, SampleSpec, StepResult

BLOCK_SIZE = 16
_T = TypeVar("_T")


@dataclass
class Clock:
    """Seconds of each kind of work, step by step."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def time(self, name: str, work: Callable[[], _T]) -> _T:
        begin = time.perf_counter()
        result = work()
        self.seconds.setdefault(name, []).append(time.perf_counter() - begin)
        return result

    def medians_us(self) -> dict[str, float]:
        return {name: statistics.median(values) * 1e6 for name, values in self.seconds.items()}


def measure(num_sequences: int, context_len: int, num_steps: int) -> dict[str, float]:
    """Medians in microseconds by kind of work, and "step_bytes" of the last step."""
    writer, reader, clock = StepWriter(2 * num_sequences), StepReader(), Clock()
    outputs = [[1] for _ in range(num_sequences)]
    prompt = range(context_len)
    tables = Tables()
    specs = [SampleSpec(SamplingParams(), i, prompt, output, frozenset({2})) for i, output in enumerate(outputs)]
    _hand_over(_batch(specs, tables), writer, reader, Clock())  # Prompts are sent once: not in the figures.
    num_bytes = 0
    for _ in range(num_steps):
        for output in outputs:
            output.append(1)
        num_bytes = _hand_over(_batch(specs, tables), writer, reader, clock)
    return {**clock.medians_us(), "step_bytes": num_bytes}


class Tables:
    """Block tables that are made anew when they grow, and not before: as the scheduler has them."""

    def __init__(self) -> None:
        self._tables: dict[int, tuple[int, ...]] = {}

    def of(self, index: int, num_tokens: int) -> tuple[int, ...]:
        num_blocks = -(-num_tokens // BLOCK_SIZE)
        if len(self._tables.get(index, ())) != num_blocks:
            self._tables[index] = tuple(range(num_blocks))
        return self._tables[index]


def _batch(specs: Sequence[SampleSpec], tables: Tables) -> Batch:
    return Batch(
        tuple(
            BatchEntry(f"cmpl-{i:032x}", (1,), spec.position - 1, tables.of(i, spec.position), spec)
            for i, spec in enumerate(specs)
        )
    )


def _hand_over(batch: Batch, writer: StepWriter, reader: StepReader, clock: Clock) -> int:
    data = clock.time("write step", lambda: encode(writer.write(batch)))
    step = clock.time("read step", lambda: decode_order(data))
    assert isinstance(step, Step)
    seen = clock.time("make batch", lambda: reader.read(step))
    result = StepResult({entry.request_id: SampledToken(5) for entry in seen.entries})
    answer = clock.time("write result", lambda: encode(write_result(seen, result)))
    report = clock.time("read result", lambda: decode_report(answer))
    assert isinstance(report, Result)
    clock.time("make result", lambda: read_result(batch, report))
    return len(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=300)
    given = parser.parse_args()
    for name, value in measure(given.sequences, given.context, given.steps).items():
        print(f"{name:<14} {value:8.0f}")


if __name__ == "__main__":
    main()
