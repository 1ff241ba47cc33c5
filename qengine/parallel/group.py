"""TPGroup: which part of every layer this rank owns.

A single rank needs no process group: `TPGroup.single()` lets any layer be built and tested alone. Invariant: shapes
that a layer derives from `rank` and `size` add up to the whole. Collectives between processes are not here yet;
`size` is 1 until they are, and config refuses more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class TPGroup:
    """This rank's place among the ranks that share each layer."""

    rank: int = 0
    size: int = 1

    @staticmethod
    def single() -> TPGroup:
        return TPGroup()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks of x [rows, features]; the identity for one rank."""
        assert self.size == 1, "collectives need a process group"
        return x
