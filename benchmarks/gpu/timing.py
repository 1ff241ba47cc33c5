"""Time on the device, with nothing in its cache: every call of a CUDA graph uses another copy of the weights.

A graph takes Python and the launches' own overhead out of the figure; the copies take the L2 cache out, which would
hold a small layer's weights and flatter everyone. Timing the same graph for each contender keeps it fair. Clocks are
reported, never set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

#: Calls in one graph at least, so that starting it (about 10 us) does not count.
MIN_CALLS = 40
REPLAYS = 20
_COPY_BYTES = 2**30


class TimedGraph:
    """A captured sequence of calls, each with its own copy of the weights."""

    def __init__(self, calls: Sequence[Callable[[], torch.Tensor]]) -> None:
        rounds = -(-MIN_CALLS // len(calls))
        self._num_calls = rounds * len(calls)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for call in calls:  # Compile and tune before capturing, where neither is allowed.
                call()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for _ in range(rounds):
                for call in calls:
                    call()
        self._graph.replay()
        torch.cuda.synchronize()

    def microseconds(self, replays: int = REPLAYS) -> list[float]:
        """Microseconds per call, one figure per replay."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = []
        for _ in range(replays):
            start.record()
            self._graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / self._num_calls)
        return times


def copy_bandwidth() -> float:
    """Bytes per second that a large copy reads and writes: the bound of everything that streams weights."""
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    graph = TimedGraph([lambda: target.copy_(source)])
    return 2 * _COPY_BYTES / (min(graph.microseconds()) * 1e-6)
