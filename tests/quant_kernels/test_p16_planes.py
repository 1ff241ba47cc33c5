"""The kernels' assembly, bit for bit: the text that is compiled, run by an emulator on every word and zero point.

The values must be the exact integers q - z (or the codebook's entries), in the lane that the word came from.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quant_kernels.linear.p16 import planes
from tests.quant_kernels.ptx import Register, floats, pair, run

DTYPES = (torch.float16, torch.bfloat16)
#: Every 16-bit word, with another one in the upper half of the register.
LOW = np.arange(1 << 16, dtype=np.int64)
HIGH = (LOW * 40503 + 12345) & 0xFFFF
WORDS: Register = LOW | HIGH << 16


def codes(bits: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The codes of each plane, in the low and in the high word."""
    shifts = range(0, 16, bits)
    mask = 2**bits - 1
    return [(torch.from_numpy(LOW >> s & mask), torch.from_numpy(HIGH >> s & mask)) for s in shifts]


def check(outputs: list[Register], dtype: torch.dtype, bits: int, zeros: list[int]) -> None:
    for output, (low, high), zero in zip(outputs, codes(bits), zeros, strict=True):
        got_low, got_high = floats(output, dtype)
        assert torch.equal(got_low, low.double() - zero)
        assert torch.equal(got_high, high.double() - zero)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "zero"), [*((4, z) for z in range(17)), *((8, z) for z in (0, 1, 15, 16, 128, 255))])
def test_constant_zero_points(dtype: torch.dtype, bits: int, zero: int) -> None:
    text = planes.constant_assembly(bits, zero, is_bfloat16=dtype == torch.bfloat16)
    check(run(text, [WORDS], 16 // bits), dtype, bits, [zero] * (16 // bits))


@pytest.mark.parametrize("zeros", [[0, 16, 5, 9], [16, 0, 8, 1], [7, 7, 15, 15]])
def test_integer_zero_points_of_4_bits(zeros: list[int]) -> None:
    def operands(values: list[float], dtype: torch.dtype) -> list[Register]:
        return [pair(torch.full((len(WORDS),), v, dtype=dtype)) for v in values]

    z0, z1, z2, z3 = zeros
    low_high = operands([1024 + z0, -64 - z1, 1024 + z2, -64 - z3], torch.float16)
    check(run(planes.SUBTRACT4_F16.value, [WORDS, *low_high], 4), torch.float16, 4, zeros)
    lows = operands([-128 - z for z in zeros], torch.bfloat16)
    check(run(planes.SUBTRACT4_BF16.value, [WORDS, *lows], 4), torch.bfloat16, 4, zeros)


@pytest.mark.parametrize("zeros", [[0, 255], [128, 3]])
def test_integer_zero_points_of_8_bits(zeros: list[int]) -> None:
    lows = [pair(torch.full((len(WORDS),), 1024.0 + z, dtype=torch.float16)) for z in zeros]
    check(run(planes.SUBTRACT2_F16.value, [WORDS, *lows], 2), torch.float16, 8, zeros)
    # In bfloat16 the kernel subtracts the zero point from whole codes, which are exact.
    outputs = run(planes.constant_assembly(8, 0, is_bfloat16=True), [WORDS], 2)
    check(outputs, torch.bfloat16, 8, [0, 0])
    values = torch.arange(256).to(torch.bfloat16) - torch.tensor(255.0, dtype=torch.bfloat16)
    assert torch.equal(values.double(), torch.arange(256).double() - 255)


@pytest.mark.parametrize("dtype", DTYPES)
def test_codebooks(dtype: torch.dtype) -> None:
    book = torch.randn(16, generator=torch.Generator().manual_seed(0)).to(dtype)
    text = planes.look_up_assembly([float(v) for v in book], is_bfloat16=dtype == torch.bfloat16)
    outputs = run(text, [WORDS], 4)
    for output, (low, high) in zip(outputs, codes(4), strict=True):
        got_low, got_high = floats(output, dtype)
        assert torch.equal(got_low, book.double()[low])
        assert torch.equal(got_high, book.double()[high])


def test_the_emulator_would_notice() -> None:
    wrong = planes.constant_assembly(4, 8, is_bfloat16=False).replace("0x00f000f0", "0x000f000f", 1)
    with pytest.raises(AssertionError):
        check(run(wrong, [WORDS], 4), torch.float16, 4, [8] * 4)
