"""Whether the vector kernels give on this processor what plain C gives: asked once, before a model is laid out.

They are chosen by what the processor says it has, and not every processor was at hand when they were written.
"""

from __future__ import annotations

import logging
from functools import lru_cache

import torch

from quant_kernels.linear.cpu_int8 import CpuInt8Linear
from quant_kernels.native.binding import Library, load
from quant_kernels.native.structures import Level
from quant_kernels.packed_weight import PackedWeight
from quant_kernels.reference import linear

logger = logging.getLogger(__name__)

_INPUTS, _OUTPUTS, _GROUP, _ROWS = 96, 24, 32, 5
#: Of a result, that rounding activations to int8 may change: half a step of 127 for each input, at random.
_ROUNDING = 0.02


@lru_cache
def checked_library() -> Library | None:
    """The library at the best instruction set that gives the right bits; None, with a line in the log, without one."""
    library, reason = load()
    if library is None:
        logger.warning("running on torch's kernels, which are slower: %s", reason)
        return None
    for level in (library.level, Level.AVX2):
        if Level.PLAIN < level <= library.level and is_right(library.at(level, max_threads=1)):
            return library.at(level)
    if library.level > Level.PLAIN:
        logger.warning("the %s kernels give wrong results here; running on torch's", library.level.text)
    return None


def is_right(library: Library) -> bool:
    """Whether matmuls have the bits of plain C, are about what records mean, and dense ones what torch gives.

    For 4 and 8 bits, coarse and fine rows, every kind of zero point and of scale.
    """
    plain = library.at(Level.PLAIN, max_threads=1)
    return _linears_are_right(library, plain) and _dense_is_right(library)


def _linears_are_right(library: Library, plain: Library) -> bool:
    x = torch.arange(_ROWS * _INPUTS, dtype=torch.float32).view(_ROWS, _INPUTS).mul(0.7).sin()
    for record in _records():
        expected = linear(x, record)
        for is_fine in (False, True):
            first, second = (CpuInt8Linear(record, lib, is_fine=is_fine).in_float32(x) for lib in (library, plain))
            if not torch.equal(first, second) or (first - expected).norm() > _ROUNDING * expected.norm():
                return False
    return True


def _dense_is_right(library: Library) -> bool:
    weight = torch.arange(_OUTPUTS * _INPUTS).view(_OUTPUTS, _INPUTS).mul(0.3).cos().bfloat16()
    x = torch.arange(_ROWS * _INPUTS, dtype=torch.float32).view(_ROWS, _INPUTS).mul(0.7).sin()
    return torch.allclose(library.dense(weight, None, x), x @ weight.float().t(), rtol=1e-5, atol=1e-5)


def _records() -> list[PackedWeight]:
    generator = torch.Generator().manual_seed(0)
    records = []
    for bits in (4, 8):
        shape, table = (_INPUTS * bits // 32, _OUTPUTS), (_INPUTS // _GROUP, _OUTPUTS)
        codes = torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)
        zeros = torch.randint(0, 2**bits, table, generator=generator).to(torch.uint8)
        scales, mins = (torch.rand(table, generator=generator) for _ in range(2))
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            common = (bits, codes, scales.to(dtype), _GROUP, _INPUTS, _OUTPUTS)
            records.append(PackedWeight(*common, zero_const=2 ** (bits - 1)))
            records.append(PackedWeight(*common, zeros=zeros))
            records.append(PackedWeight(*common, mins=mins.to(dtype)))
    return records
