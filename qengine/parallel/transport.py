"""Transport: how the ranks of one model hand each other tensors.

Layers, workers and the check of two cards speak to this protocol alone, whatever carries it: NCCL between GPUs, gloo
between CPUs, host memory where two cards must not touch each other's. Invariant: every rank makes the same calls in the
same order; a call that can never complete raises within the transport's time limit instead of waiting for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch


class Transport(Protocol):
    """Tensors between `size` ranks, of which this is `rank`. Shapes and dtypes are agreed beforehand by all."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, the same bits on every rank; x itself is overwritten and returned."""
        ...

    def all_gather(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        """x [rows, widths[rank]] of every rank, side by side: [rows, sum(widths)]."""
        ...

    def send(self, x: torch.Tensor, to: int) -> None:
        """Hand x to a rank that receives it; x may be reused on return."""
        ...

    def receive(self, x: torch.Tensor, source: int) -> torch.Tensor:
        """Fill x from a rank that sends it."""
        ...

    def close(self) -> None:
        """Release sockets and memory. Idempotent."""
        ...


class SingleTransport:
    """One rank: nothing to hand over."""

    rank = 0
    size = 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        assert len(widths) == 1, "one rank has one part"
        return x

    def send(self, x: torch.Tensor, to: int) -> None:
        raise AssertionError("a single rank has nobody to send to")

    def receive(self, x: torch.Tensor, source: int) -> torch.Tensor:
        raise AssertionError("a single rank has nobody to receive from")

    def close(self) -> None:
        """Nothing is held."""
