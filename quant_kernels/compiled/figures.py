"""The plain figures of a compiled variant, as its machine code shows them: what is counted, and worth caching.

Instructions are counted in the main loop, or in the whole kernel where there is none, per weight that a thread unpacks
there, or per number of keys and values that it reads. Judging the figures is left to `report`.
"""

from __future__ import annotations

from typing import Any

from quant_kernels.compiled.cross_compile import Compiled
from quant_kernels.compiled.sass import Loop, main_loop, whole
from quant_kernels.compiled.variants import AnyVariant


def measure(variant: AnyVariant, compiled: Compiled) -> dict[str, Any]:
    """The plain figures of a compiled variant: what is worth caching."""
    figures: dict[str, Any] = {
        "shared_bytes": compiled.shared_bytes,
        "registers": compiled.registers,
        "spill_bytes": compiled.spill_bytes,
    }
    if not variant.weights_per_thread:
        return figures
    loop = whole(compiled.sass) if variant.tile is None else main_loop(compiled.sass)
    if loop is not None:
        figures |= _per_weight(loop, variant.weights_per_thread)
    return figures


def _per_weight(loop: Loop, weights: float) -> dict[str, float]:
    return {
        "instr_per_weight": loop.num_instructions / weights,
        "lop3_per_weight": loop.count("LOP3") / weights,
        "prmt_per_weight": loop.count("PRMT") / weights,
        "i2f_per_weight": loop.count("I2F") / weights,
    }
