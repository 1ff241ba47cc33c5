"""What metrics cost per step: stamping and counting every sequence, and recording the step.

    python -m benchmarks.metrics_cost [--sequences 64] [--steps 2000]

A step gives each of N running sequences one token; every tenth step one of them ends. No model runs. Printed is the
median of the time per step, in microseconds.
"""

from __future__ import annotations

import argparse
import statistics
import time

from qengine.request import Request, SamplingParams
from qengine.scheduling.records import SchedulerStats
from qengine.serving.metrics.catalog import EngineMetrics
from qengine.serving.metrics.recorder import Recorder
from qengine.step_stats import EngineLoad, StepStats

_END_EVERY = 10


def measure(num_sequences: int, num_steps: int) -> float:
    """Median seconds per step."""
    recorder = Recorder(EngineMetrics("qengine:", "model", 8192), num_blocks=4096)
    load, totals = EngineLoad(num_sequences, 8, 0, 1024, 512), SchedulerStats()
    sequences = [Request(str(i), [1] * 100, SamplingParams(), output_token_ids=[1] * 50) for i in range(num_sequences)]
    seconds = []
    for index in range(num_steps):
        began = time.perf_counter()
        now = time.monotonic()
        stats = StepStats(now, now, time.monotonic())
        for sequence in sequences:
            sequence.finish_reason = "length" if index % _END_EVERY == 0 and sequence is sequences[0] else None
            stats.count(sequence, 1)
        stats.ended = time.monotonic()
        recorder.on_step(stats)
        recorder.tell_load(load, totals)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    print(f"{args.sequences} sequences: {1e6 * measure(args.sequences, args.steps):.1f} us per step")


if __name__ == "__main__":
    main()
