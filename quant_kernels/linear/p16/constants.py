"""A weight's scheme and a tile as the constants that P16 kernels are compiled with.

Invariant: the fast path runs on CUDA devices; in Triton's interpreter the plain twin runs, in float32 where the
interpreter's bfloat16 is wrong.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from quant_kernels.launching import interpreting, launch_options
from quant_kernels.linear.p16.planes import assembly_for
from quant_kernels.scheme import Scheme, ZeroKind
from quant_kernels.tuning.tile import Tile

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def scheme_constants(scheme: Scheme, x: torch.dtype | None = None, *, twin: bool = False) -> dict[str, Any]:
    """The constexpr arguments that describe a weight.

    Args:
        x: of the activations, if they are not the scheme's: float32, which the interpreter alone is given.
    """
    interpreted = interpreting()
    is_wide = x == torch.float32 or (interpreted and scheme.dtype == torch.bfloat16)
    return {
        "BITS": scheme.bits,
        "GROUPS": scheme.groups,
        "BLOCKS_PER_GROUP": scheme.blocks_per_group,
        "ZERO": int(scheme.zero),
        "ZERO_VALUE": scheme.zero_value,
        "CODEBOOK": scheme.codebook,
        "ASSEMBLY": assembly_for(scheme),
        "SCALE": _TYPES[scheme.scale_dtype],
        "STORED": _TYPES[scheme.dtype],
        "DTYPE": tl.float32 if is_wide else _TYPES[scheme.dtype],
        "ASM": not (twin or interpreted),
    }


def matmul_constants(scheme: Scheme, tile: Tile, x: torch.dtype | None = None, *, twin: bool = False) -> dict[str, Any]:
    """The constexpr arguments that describe a weight and how its sums are scaled; `x` as for `scheme_constants`."""
    # Mins can be added to a weight, but not to a sum.
    scale_weight = (tile.scale_weight and scheme.blocks_per_group > 0) or scheme.zero == ZeroKind.MIN
    half_sums = tile.half_sums and scale_weight and scheme.dtype == torch.float16
    return {**scheme_constants(scheme, x, twin=twin), "SCALE_WEIGHT": scale_weight, "HALF_SUMS": half_sums}


def tile_options(tile: Tile) -> dict[str, Any]:
    """Triton's options for a tile."""
    return launch_options(tile.num_warps, tile.num_stages, tile.max_registers)
