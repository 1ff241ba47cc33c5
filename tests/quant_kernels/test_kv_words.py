"""Words of a quantized cache, bit for bit: the text that is compiled, run by an emulator on every word, and its twin.

Every byte must become exactly the number that torch makes of it, in the lane that the word came from.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from quant_kernels.attention import words
from quant_kernels.attention.kv_format import FP8_E4M3, FP8_E5M2, INT8, KVFormat, decode, encode
from tests.quant_kernels.ptx import Register, floats, run

BYTES = (INT8, FP8_E4M3, FP8_E5M2)
TEXTS = {INT8: words.INT8_TEXT, FP8_E4M3: words.E4M3_TEXT, FP8_E5M2: words.E5M2_TEXT}
LOW = np.arange(1 << 16, dtype=np.int64)
HIGH = (LOW * 40503 + 12345) & 0xFFFF
WORDS: Register = LOW | HIGH << 16


def numbers(codes: np.ndarray, kv_format: KVFormat) -> torch.Tensor:
    """What unpacking must give for bytes: torch's number, short of the factor. NaN where the byte is none."""
    exact = decode(torch.from_numpy(codes.astype(np.uint8)), kv_format, torch.float64)
    return exact / words.FACTORS[kv_format.kind]


def agree(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal wherever there is a number; e4m3's two NaN bytes are never stored, and unpack to something finite."""
    real = ~expected.isnan()
    return torch.equal(got.double()[real], expected[real])


@pytest.mark.parametrize("kv_format", BYTES, ids=lambda f: f.name)
def test_assembly(kv_format: KVFormat) -> None:
    halves = run(TEXTS[kv_format].value, [WORDS], 2)
    for half, shift in zip(halves, (0, 8), strict=True):
        low, high = floats(half, torch.float16)
        assert agree(low, numbers(LOW >> shift & 0xFF, kv_format))
        assert agree(high, numbers(HIGH >> shift & 0xFF, kv_format))


@pytest.mark.parametrize("kv_format", BYTES, ids=lambda f: f.name)
def test_the_emulator_would_notice(kv_format: KVFormat) -> None:
    wrong = {
        INT8: ("0x64806480", "0x64816481"),
        FP8_E4M3: ("rest, 1;", "rest, 2;"),
        FP8_E5M2: ("0xff00ff00", "0xfe00fe00"),
    }
    text = TEXTS[kv_format].value.replace(*wrong[kv_format])
    low, _ = floats(run(text, [WORDS], 2)[0], torch.float16)
    assert not agree(low, numbers(LOW & 0xFF, kv_format))


@triton.jit
def twin_kernel(words_ptr, low_ptr, high_ptr, KIND: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low, high = words.unpack(tl.load(words_ptr + places), KIND, tl.float16, False)
    tl.store(low_ptr + places, low)
    tl.store(high_ptr + places, high)


@triton.jit
def pack_kernel(x_ptr, out_ptr, KIND: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + places, words.pack_byte(tl.load(x_ptr + places), KIND).to(tl.uint8))


@pytest.mark.parametrize("kv_format", BYTES, ids=lambda f: f.name)
def test_twin(kv_format: KVFormat, device: torch.device) -> None:
    stored = torch.from_numpy(LOW.astype(np.uint16).view(np.int16)).to(device)
    low, high = (torch.empty(len(LOW), dtype=torch.float16, device=device) for _ in range(2))
    twin_kernel[(len(LOW) // 4096,)](stored, low, high, KIND=int(kv_format.kind), BLOCK=4096)
    assert agree(low.cpu(), numbers(LOW & 0xFF, kv_format))
    assert agree(high.cpu(), numbers(LOW >> 8, kv_format))


@pytest.mark.parametrize("kv_format", [FP8_E4M3, FP8_E5M2], ids=lambda f: f.name)
def test_rounding_to_bytes_is_torchs(kv_format: KVFormat, device: torch.device) -> None:
    """Every float16, its neighbours in float32, and halves between bytes: the same byte as torch's conversion."""
    halves = torch.from_numpy(LOW.astype(np.uint16).view(np.int16)).view(torch.float16).float()
    halves = halves[halves.isfinite()]
    halves = torch.cat([halves, halves.nextafter(torch.tensor(1e9)), halves.nextafter(torch.tensor(-1e9))])
    x = torch.nn.functional.pad(halves, (0, triton.next_power_of_2(len(halves)) - len(halves))).to(device)
    out = torch.empty(len(x), dtype=torch.uint8, device=device)
    pack_kernel[(len(x) // 4096,)](x, out, KIND=int(kv_format.kind), BLOCK=4096)
    if kv_format is FP8_E5M2:
        expected, _ = encode(x.cpu(), kv_format)
    else:
        expected = x.cpu().clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(out.cpu(), expected)


def test_int8_rounds_to_even(device: torch.device) -> None:
    x = torch.arange(-254, 255, dtype=torch.float32) / 2
    x = torch.nn.functional.pad(x, (0, 512 - len(x))).to(device)
    out = torch.empty(512, dtype=torch.uint8, device=device)
    pack_kernel[(1,)](x, out, KIND=int(INT8.kind), BLOCK=512)
    assert torch.equal(out.cpu().int() - 128, x.cpu().round().int())
