"""Scheme: everything about a quantized weight that a kernel is compiled for, and nothing about its size.

A value that the layout, the kernels and the choice of a configuration share. The unit is the block of the P16 layout:
32 rows of 16-bit words, 128 inputs of 4 bits or 64 of 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch

#: Rows of words in a block, and inputs in a plane.
PLANE_ROWS = 32
#: Outputs are padded to a multiple of this, the narrowest tile that divides every wider one.
COLUMN_MULTIPLE = 128
#: What tensor cores multiply; also the types of scales.
ACTIVATION_DTYPES = (torch.float16, torch.bfloat16)


class ZeroKind(IntEnum):
    """How a weight is made from its code; see `PackedWeight`."""

    CONST = 0
    INTEGER = 1
    MIN = 2
    CODEBOOK = 3


@dataclass(frozen=True, slots=True)
class Scheme:
    """What a kernel is compiled for: everything about a weight but its sizes.

    Attributes:
        bits: 4 or 8.
        groups: groups in a block of 32 words: 1, 2 or 4.
        blocks_per_group: blocks that share a row of the tables; 0 if all of K is one group.
        zero: how weights are made from codes.
        zero_value: the constant zero point; for mins the code that they are centred on.
        scale_dtype: float16 or bfloat16, of scales and mins.
        dtype: float16 or bfloat16, of the activations, and of zero points and codebook.
        codebook: 16 values that `dtype` holds, or None.
    """

    bits: int
    groups: int
    blocks_per_group: int
    zero: ZeroKind
    zero_value: int
    scale_dtype: torch.dtype
    dtype: torch.dtype
    codebook: tuple[float, ...] | None = None

    @property
    def planes(self) -> int:
        """Codes in a word."""
        return 16 // self.bits

    @property
    def block_inputs(self) -> int:
        """Inputs in a block."""
        return PLANE_ROWS * self.planes

    @property
    def group_size(self) -> int:
        """Inputs that share a scale, as the kernel sees them; 0 for all of K."""
        return self.block_inputs // self.groups * self.blocks_per_group
