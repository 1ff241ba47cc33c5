"""What is asked of the distribution of each row, as plain numbers, and the random number that decides its draw."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from qengine.scheduling.batch import SampleSpec


@dataclass(frozen=True, slots=True)
class RowSettings:
    """Parameters of the draw, an entry per row.

    Attributes:
        temperature: 0 is greedy.
        min_p: 0 is off.
        top_k: 0 is off.
        top_p: 1 is off.
        uniform: in [0, 1), from the row's seed and position; 0 for greedy rows, which draw nothing.
    """

    temperature: tuple[float, ...]
    min_p: tuple[float, ...]
    top_k: tuple[int, ...]
    top_p: tuple[float, ...]
    uniform: tuple[float, ...]

    @classmethod
    def of(cls, specs: Sequence[SampleSpec], vocab: int) -> RowSettings:
        """The settings of each spec."""
        params = [spec.params for spec in specs]
        return cls(
            temperature=tuple(0.0 if p.is_greedy else p.temperature for p in params),
            min_p=tuple(p.min_p for p in params),
            top_k=tuple(p.top_k if 0 < p.top_k < vocab else 0 for p in params),
            top_p=tuple(p.top_p for p in params),
            uniform=tuple(0.0 if s.params.is_greedy else uniform(s.seed, s.position) for s in specs),
        )

    def rows(self, rows: Sequence[int]) -> RowSettings:
        """The settings of some of the rows."""
        columns = (self.temperature, self.min_p, self.top_k, self.top_p, self.uniform)
        return RowSettings(*(tuple(column[row] for row in rows) for column in columns))  # type: ignore[arg-type]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from a hash of seed and position: the same in any batch and on any machine."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed % 2**64, position), digest_size=8).digest()
    return float(int.from_bytes(digest, "little") >> 11) / 2.0**53
