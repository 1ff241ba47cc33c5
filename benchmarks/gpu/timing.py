"""Time on the device, with nothing in its cache: every call of a CUDA graph uses another copy of the weights.

A graph takes Python and the launches' own overhead out of the figure; the copies take the L2 cache out, which would
hold a small layer's weights and flatter everyone. The same kind of graph for each contender keeps it fair. Clocks are
never set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

#: What a replay takes at least, so that starting a graph (about 10 us) does not count.
MIN_MICROSECONDS = 2000.0
REPLAYS = 20
_COPY_BYTES = 2**30

Calls = Sequence[Callable[[], torch.Tensor]]


class TimedGraph:
    """A captured sequence of calls, each with its own copy of the weights."""

    def __init__(self, calls: Calls) -> None:
        # A graph does not own what its kernels read: the calls hold the weights, so they are held here.
        self._calls = calls
        _warm_up(calls)
        rounds = max(1, round(MIN_MICROSECONDS / _eager_microseconds(calls)))
        self._num_calls = rounds * len(calls)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for _ in range(rounds):
                _run(calls)
        self._graph.replay()
        torch.cuda.synchronize()

    def microseconds(self, replays: int = REPLAYS) -> list[float]:
        """Microseconds per call, one figure per replay."""
        return [_elapsed(self._graph.replay) / self._num_calls for _ in range(replays)]


def copy_bandwidth() -> float:
    """Bytes per second that a large copy reads and writes: the bound of everything that streams weights."""
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    graph = TimedGraph([lambda: target.copy_(source)])
    return 2 * _COPY_BYTES / (min(graph.microseconds()) * 1e-6)


def records(spec: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What the GPU's worker answers: the bandwidth alone."""
    yield {"copy_bytes_per_s": copy_bandwidth()}


def _warm_up(calls: Calls) -> None:
    """Compile and tune before capturing, where neither is allowed, on a stream of its own as captures want it."""
    # Nothing orders a new stream after the one that has just filled the weights.
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        _run(calls)
    torch.cuda.synchronize()


def _eager_microseconds(calls: Calls) -> float:
    return max(1.0, _elapsed(lambda: _run(calls)))


def _run(calls: Calls) -> None:
    for call in calls:
        call()


def _elapsed(work: Callable[[], object]) -> float:
    """Microseconds between two events around some work."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3
