"""Ranks as threads of one process, for tests: a Transport in memory, and a way to run a function on every rank.

One thread computes at a time and hands a baton on wherever it waits for others, since Triton's interpreter knows one
kernel at a time. So the order of events is a test's own, however busy the machine is.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

LIMIT_S = 120.0
T = TypeVar("T")


class Baton:
    """Held by the thread that computes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def held(self) -> threading.Lock:
        return self._lock

    @contextmanager
    def handed_on(self) -> Iterator[None]:
        """While waiting."""
        self._lock.release()
        try:
            yield
        finally:
            self._lock.acquire()


class ThreadHub:
    """Where the threads of one transport meet."""

    def __init__(self, size: int, baton: Baton) -> None:
        self.size = size
        self.baton = baton
        self.barrier = threading.Barrier(size)
        self.slots: list[torch.Tensor | None] = [None] * size
        self.letters: dict[tuple[int, int], queue.Queue[torch.Tensor]] = {
            (a, b): queue.Queue() for a in range(size) for b in range(size)
        }

    def transports(self) -> list[ThreadTransport]:
        return [ThreadTransport(self, rank) for rank in range(self.size)]


class ThreadTransport:
    """See `Transport`. Parts are added up in the order of ranks, so all ranks have the same bits."""

    def __init__(self, hub: ThreadHub, rank: int) -> None:
        self._hub = hub
        self.rank = rank
        self.size = hub.size
        self.num_calls = 0

    def _exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.num_calls += 1
        self._hub.slots[self.rank] = x.clone()
        self._meet()
        parts = [slot for slot in self._hub.slots if slot is not None]
        self._meet()
        return parts

    def _meet(self) -> None:
        with self._hub.baton.handed_on():
            self._hub.barrier.wait(LIMIT_S)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        parts = self._exchange(x)
        assert len({(part.shape, part.dtype) for part in parts}) == 1, "ranks disagree"
        return x.copy_(torch.stack(parts).sum(0))

    def all_gather(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        parts = self._exchange(x)
        assert [part.shape[1] for part in parts] == list(widths), "ranks disagree"
        return torch.cat(parts, dim=1)

    def send(self, x: torch.Tensor, to: int) -> None:
        self._hub.letters[self.rank, to].put(x.clone())

    def receive(self, x: torch.Tensor, source: int) -> torch.Tensor:
        with self._hub.baton.handed_on():
            letter = self._hub.letters[source, self.rank].get(timeout=LIMIT_S)
        assert (letter.shape, letter.dtype) == (x.shape, x.dtype), "ranks disagree"
        return x.copy_(letter)

    def close(self) -> None:
        self._hub.barrier.abort()


def on_ranks(size: int, baton: Baton, work: Callable[[int], T]) -> list[T]:
    """work(rank) of every rank. One that fails must close its transports, or the others wait for it."""

    def run(rank: int) -> T:
        with baton.held():
            return work(rank)

    with ThreadPoolExecutor(size) as pool:
        running = [pool.submit(run, rank) for rank in range(size)]
        errors = [error for future in running if (error := future.exception()) is not None]
        # Ranks whose peer has gone fail with a broken barrier: the reason is the other one's.
        reasons = [e for e in errors if not isinstance(e, threading.BrokenBarrierError)]
        if errors:
            raise (reasons or errors)[0]
        return [future.result() for future in running]
