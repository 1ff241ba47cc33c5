"""What every launch of a P16 kernel shares: a scheme as the kernels' constants, a tile as Triton's options.

Invariant: the fast path runs on CUDA devices of sm_80 and later; in Triton's interpreter the plain twin runs, in
float32 where the interpreter's bfloat16 is wrong. Nothing here launches.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from quant_kernels.linear.p16.layout import Scheme, ZeroKind
from quant_kernels.linear.p16.planes import assembly_for
from quant_kernels.tuning.tile import Tile

#: What a thread can have at most.
MAX_REGISTERS = 255
_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return bool(triton.knobs.runtime.interpret)


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a kernel writes for results of `dtype`: float32 in the interpreter, which cuts bfloat16 off unrounded."""
    return torch.float32 if interpreting() and dtype == torch.bfloat16 else dtype


def scheme_constants(scheme: Scheme, *, twin: bool = False) -> dict[str, Any]:
    """The constexpr arguments that describe a weight."""
    is_bfloat16 = scheme.dtype == torch.bfloat16
    interpreted = interpreting()
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
        "DTYPE": tl.float32 if interpreted and is_bfloat16 else _TYPES[scheme.dtype],
        "ASM": not (twin or interpreted),
    }


def constants(scheme: Scheme, tile: Tile, *, twin: bool = False) -> dict[str, Any]:
    """The constexpr arguments that describe a weight and how its sums are scaled."""
    # Mins can be added to a weight, but not to a sum.
    scale_weight = (tile.scale_weight and scheme.blocks_per_group > 0) or scheme.zero == ZeroKind.MIN
    half_sums = tile.half_sums and scale_weight and scheme.dtype == torch.float16
    return {**scheme_constants(scheme, twin=twin), "SCALE_WEIGHT": scale_weight, "HALF_SUMS": half_sums}


def launch_options(tile: Tile) -> dict[str, Any]:
    """Triton's options for a tile."""
    options = {"num_stages": tile.num_stages}
    return {} if interpreting() else {**warp_options(tile.num_warps, tile.max_registers), **options}


def warp_options(num_warps: int, max_registers: int = MAX_REGISTERS) -> dict[str, Any]:
    """Triton's options for a kernel without a pipeline; none in the interpreter.

    Contraction of products and sums is asked for by name: its default differs by version.
    """
    options = {"num_warps": num_warps, "maxnreg": max_registers, "enable_fp_fusion": True}
    return {} if interpreting() else options
