"""What every launch of a Triton kernel shares, whatever it computes: the interpreter's limits, and the options.

Invariant: on a machine without a GPU kernels run in Triton's interpreter, which takes no options and cuts bfloat16
off where it should round; callers ask here instead of looking themselves. Nothing here launches.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

#: What a thread can have at most.
MAX_REGISTERS = 255


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return bool(triton.knobs.runtime.interpret)


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a kernel writes for results of `dtype`: float32 in the interpreter where that would be bfloat16."""
    return torch.float32 if interpreting() and dtype == torch.bfloat16 else dtype


def launch_options(num_warps: int, num_stages: int | None = None, max_registers: int = MAX_REGISTERS) -> dict[str, Any]:
    """Triton's options; none in the interpreter.

    Contraction of products and sums is asked for by name: its default differs by version. So is the limit of registers:
    left to itself the assembler aims at a rounder number and spills to get there.
    """
    options: dict[str, Any] = {"num_warps": num_warps, "maxnreg": max_registers, "enable_fp_fusion": True}
    if num_stages is not None:
        options["num_stages"] = num_stages
    return {} if interpreting() else options
