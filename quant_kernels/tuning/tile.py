"""Tile: one configuration of the matmul kernels. A value: it chooses nothing and launches nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from quant_kernels.scheme import PLANE_ROWS


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program of a matmul kernel computes, and how.

    Attributes:
        block_m: rows of x; 16 or more, since that is the tensor cores' tile.
        block_n: outputs. At least 2 block_m, or warps would unpack the same weights twice.
        word_rows: rows of words per step of the loop, 32 (a whole block) or 16.
        num_warps, num_stages: Triton's own.
        group_m: bands of this many row tiles run through all columns together, so that their weights stay in L2.
        scale_weight: scale the weights instead of the sums: cheaper for tall tiles, one rounding more per weight.
        half_sums: add a step up in float16. Twice as fast on GeForce tensor cores; may overflow. Never the default.
        max_registers: what a thread may take. Said aloud, since the assembler left to itself aims at a rounder number
            and spills to get there.
    """

    block_m: int
    block_n: int
    word_rows: int = PLANE_ROWS
    num_warps: int = 4
    num_stages: int = 4
    group_m: int = 8
    scale_weight: bool = False
    half_sums: bool = False
    max_registers: int = 255

    def __post_init__(self) -> None:
        if self.word_rows not in (PLANE_ROWS, PLANE_ROWS // 2):
            raise ValueError(f"word_rows is {self.word_rows}, expected {PLANE_ROWS} or {PLANE_ROWS // 2}")
        if self.half_sums and not self.scale_weight:
            raise ValueError("half_sums needs scale_weight: unscaled sums would overflow float16")
        for name in ("block_m", "block_n", "num_warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name} is {value}, expected a power of two")
        if self.block_m < 16:
            raise ValueError(f"block_m is {self.block_m}, expected 16 or more")

    @property
    def name(self) -> str:
        """Short, e.g. "16x128 r32 w4 s4": rows x columns, rows of words per step, warps, stages."""
        text = f"{self.block_m}x{self.block_n} r{self.word_rows} w{self.num_warps} s{self.num_stages}"
        others = [(f" g{self.group_m}", self.group_m != 8), (f" reg{self.max_registers}", self.max_registers != 255)]
        flags = [("+sw", self.scale_weight), ("+half", self.half_sums), *others]
        return text + "".join(flag for flag, is_on in flags if is_on)

    def shared_bytes(self, bits: int, arch: int) -> int:
        """About what the compiler allots of shared memory: the pipeline's buffers, and wgmma's operands on sm_90."""
        inputs = self.word_rows * (16 // bits)
        stage = self.word_rows * self.block_n * 2 + self.block_m * inputs * 2
        operands = 2 * inputs * (self.block_m + self.block_n) if arch == 90 and self.block_m >= 64 else 0
        return max(1, self.num_stages - 1) * stage + operands + 1024

    def to_json(self) -> dict[str, Any]:
        """The fields that differ from the defaults, and the block sizes."""
        defaults = {f.name: f.default for f in fields(self)}
        return {k: v for k, v in asdict(self).items() if v != defaults[k]}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Tile:
        """Raises ValueError for unknown fields or values that no kernel has."""
        known = {f.name for f in fields(cls)}
        if unknown := set(record) - known:
            raise ValueError(f"unknown fields of a tile: {', '.join(sorted(unknown))}")
        return cls(**record)
