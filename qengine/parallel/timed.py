"""TimedTransport: a transport whose collectives are timed on the host's clock.

Invariant: tensors and errors are those of the transport inside. A call's seconds include the wait for slower ranks. It
is for transports whose calls return when the data is there, as between CPUs; where calls only queue work, as on a
GPU's stream, the host's clock says nothing. Sends and receives between stages are not counted.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from qengine.parallel.transport import Transport


class TimedTransport:
    """A `Transport`. For one thread.

    Attributes:
        seconds: spent in all-reduce and all-gather so far.
    """

    def __init__(self, inner: Transport) -> None:
        self._inner = inner
        self.seconds = 0.0

    @property
    def rank(self) -> int:
        return self._inner.rank

    @property
    def size(self) -> int:
        return self._inner.size

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        begin = time.perf_counter()
        total = self._inner.all_reduce(x)
        self.seconds += time.perf_counter() - begin
        return total

    def all_gather(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        begin = time.perf_counter()
        gathered = self._inner.all_gather(x, widths)
        self.seconds += time.perf_counter() - begin
        return gathered

    def send(self, x: torch.Tensor, to: int) -> None:
        self._inner.send(x, to)

    def receive(self, x: torch.Tensor, source: int) -> torch.Tensor:
        return self._inner.receive(x, source)

    def close(self) -> None:
        self._inner.close()
