"""A transport that is timed: what it counts, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch

from qengine.parallel import timed
from qengine.parallel.timed import TimedTransport
from qengine.parallel.transport import SingleTransport


class Clock:
    """Every look at it is half a second after the last."""

    now = 0.0

    def perf_counter(self) -> float:
        self.now += 0.5
        return self.now


class Inner(SingleTransport):
    """Says what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def send(self, x: torch.Tensor, to: int) -> None:
        self.calls.append(f"send {to}")

    def receive(self, x: torch.Tensor, source: int) -> torch.Tensor:
        self.calls.append(f"receive {source}")
        return x

    def close(self) -> None:
        self.calls.append("close")


def test_collectives_are_timed_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timed, "time", Clock())
    inner, x = Inner(), torch.ones(2, 3)
    transport = TimedTransport(inner)
    assert (transport.rank, transport.size, transport.seconds) == (0, 1, 0.0)
    assert transport.all_reduce(x) is x
    assert transport.seconds == 0.5
    assert transport.all_gather(x, [3]) is x
    assert transport.seconds == 1.0
    transport.send(x, 4)
    assert transport.receive(x, 5) is x
    transport.close()
    assert inner.calls == ["send 4", "receive 5", "close"]
    assert transport.seconds == 1.0
