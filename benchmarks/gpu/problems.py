"""The matmuls that are measured: linears of real models at the numbers of rows that occur.

Values only. K inputs, N outputs, as fused in a decoder layer: qkv and gate_up are one matmul each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Shape:
    """One linear."""

    name: str
    in_features: int
    out_features: int

    @property
    def num_weights(self) -> int:
        return self.in_features * self.out_features


#: Sizes from the models' config.json: Llama-3-8B, Llama-3-70B, and the square that peers publish.
SHAPES: Mapping[str, tuple[Shape, ...]] = {
    "8b": (
        Shape("8B qkv", 4096, 6144),
        Shape("8B o", 4096, 4096),
        Shape("8B gate_up", 4096, 28672),
        Shape("8B down", 14336, 4096),
    ),
    "70b": (
        Shape("70B qkv", 8192, 10240),
        Shape("70B o", 8192, 8192),
        Shape("70B gate_up", 8192, 57344),
        Shape("70B down", 28672, 8192),
    ),
    "square": (Shape("8192 x 8192", 8192, 8192),),
}
#: Rows of x: every batch of a decode step up to 16 by powers of two, then up to a whole chunk.
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


@dataclass(frozen=True, slots=True)
class Workload:
    """What one part of the benchmark measures; `zero` is "const" or "integer"."""

    shapes: str
    dtype: str
    group_size: int
    zero: str
    rows: tuple[int, ...] = ROWS
    rounds: int = 5

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "rows": list(self.rows)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Workload:
        return cls(**{**record, "rows": tuple(record["rows"])})


def num_copies(num_bytes: int, l2_bytes: int) -> int:
    """How many copies of a weight, used in turn, make sure that none is still in the cache: three times its size."""
    return -(-3 * l2_bytes // num_bytes) + 1
