"""What GGUF's block types become, without data and without torch: see `gguf` for the blocks.

Invariant: every type that is named here can be read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from converters.formats.base import DTYPE_NAMES
from converters.gguf_file import GGUFTensor
from quant_kernels.footprint import WeightFacts

BLOCK = 32
#: Types that are no blocks.
FLOAT_TYPES = tuple(DTYPE_NAMES)


@dataclass(frozen=True, slots=True)
class Packing:
    """How one block type becomes a record. A zero point of None means that the blocks carry mins."""

    bits: int
    zero_point: int | None

    @property
    def head_bytes(self) -> int:
        """Bytes before the codes: the scale, and the min if there is one."""
        return 2 if self.zero_point is not None else 4


#: Types of blocks.
PACKINGS: Mapping[str, Packing] = {"Q4_0": Packing(4, 8), "Q4_1": Packing(4, None), "Q8_0": Packing(8, 128)}
SUPPORTED_TYPES = (*PACKINGS, *FLOAT_TYPES)


def linear_facts(tensor: GGUFTensor, bias: GGUFTensor | None) -> WeightFacts:
    """What a linear [out, in] of a supported type will be read as."""
    out_features, in_features = tensor.shape
    bias_dtype = None if bias is None else DTYPE_NAMES[bias.type.name]
    packing = PACKINGS.get(tensor.type.name)
    if packing is None:
        return WeightFacts(in_features, out_features, bias_dtype=bias_dtype)
    return WeightFacts(
        in_features,
        out_features,
        bits=packing.bits,
        group_size=BLOCK,
        zero_const=packing.zero_point,
        has_mins=packing.zero_point is None,
        bias_dtype=bias_dtype,
    )
