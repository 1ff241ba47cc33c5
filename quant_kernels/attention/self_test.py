"""Every word of a quantized cache, unpacked by assembly and by its plain twin: whether both agree on this device.

The texts are checked bit by bit elsewhere; this asks what no test without the device can. It takes milliseconds once
the kernels are compiled, and Triton keeps them on disk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quant_kernels.attention.kv_format import KVKind
from quant_kernels.attention.words import log2_and_inverse, unpack
from quant_kernels.launching import interpreting

_NUM_WORDS, _BLOCK = 1 << 16, 4096
#: log2 and 1 / x of the assembly are approximate.
_TOLERANCE = 2.0**-18


@triton.jit
def _unpack_kernel(words_ptr, low_ptr, high_ptr, KIND: tl.constexpr, ASM: tl.constexpr, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low, high = unpack(tl.load(words_ptr + places), KIND, tl.float16, ASM)
    tl.store(low_ptr + places, low)
    tl.store(high_ptr + places, high)


@triton.jit
def _scales_kernel(scales_ptr, logs_ptr, inverses_ptr, ASM: tl.constexpr, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    logs, inverses = log2_and_inverse(tl.load(scales_ptr + places), ASM)
    tl.store(logs_ptr + places, logs)
    tl.store(inverses_ptr + places, inverses)


def words_are_right(device: torch.device) -> bool:
    """Whether the fast path reads all words of every kind, and scales, as its twin does."""
    words = torch.arange(_NUM_WORDS, dtype=torch.int32).to(torch.int16).to(device)
    kinds = (KVKind.INT8, KVKind.E4M3, KVKind.E5M2)
    return all(_unpacks_alike(words, kind) for kind in kinds) and _scales_alike(device)


def _unpacks_alike(words: torch.Tensor, kind: KVKind) -> bool:
    fast, twin = (torch.empty(2, _NUM_WORDS, dtype=torch.float16, device=words.device) for _ in range(2))
    for out, is_fast in ((fast, True), (twin, False)):
        _unpack_kernel[(_NUM_WORDS // _BLOCK,)](
            words, out[0], out[1], KIND=int(kind), ASM=is_fast and not interpreting(), BLOCK=_BLOCK
        )
    # As bits: some bytes of the float8 kinds are NaN.
    return torch.equal(fast.view(torch.int16), twin.view(torch.int16))


def _scales_alike(device: torch.device) -> bool:
    scales = torch.logspace(-99, 99, _BLOCK, base=2.0, dtype=torch.float32, device=device)
    fast, twin = (torch.empty(2, _BLOCK, device=device) for _ in range(2))
    for out, is_fast in ((fast, True), (twin, False)):
        _scales_kernel[(1,)](scales, out[0], out[1], ASM=is_fast and not interpreting(), BLOCK=_BLOCK)
    return torch.allclose(fast, twin, rtol=_TOLERANCE, atol=_TOLERANCE)
