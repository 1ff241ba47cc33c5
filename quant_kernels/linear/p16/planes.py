"""From packed words to planes of weights, in registers: the inner step of every kernel that reads P16.

A word of `layout` holds codes of rows that lie a plane apart, so masking it in place yields whole planes and no code
ever moves to another lane. The fast path works on two words at once, in one 32-bit register that the tensor core's
operand layout has already put side by side::

    (w & 0x000f000f) | 0x64006400   =  fp16 1024 + q      the exponent of 1024, the code in the mantissa
    (w & 0x00f000f0) | 0x64006400   =  fp16 1024 + 16 q
    (w & 0x000f000f) | 0x43004300   =  bf16  128 + q      seven bits of mantissa, so every code is shifted down

one LOP3 each, and one subtraction or multiply-add takes the constant and the zero point away. Every value on the way
is one that its type holds, so no step rounds (the idea: Kim et al. 2022, arXiv 2211.10017). A codebook of 16 entries
is looked up by PRMT, which picks four bytes by four 4-bit selectors: a word is just that.

Where nothing but the words varies (one zero point for all, or a codebook) the assembly is text made on the host, with
every constant an immediate: `assembly_for`. Integer zero points are operands.

Invariant: the fast path and its plain twin (ASM = False) give the same bits. The twin is what runs in Triton's
interpreter, which cannot execute assembly. Scales are not applied here. STORED is the activations' type, DTYPE the
type to compute in: the same, but float32 for bfloat16 in the interpreter, whose bfloat16 arithmetic is wrong.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl

from quant_kernels.scheme import Scheme, ZeroKind

#: The values of the kernels' ZERO.
ZERO_INTEGER = tl.constexpr(int(ZeroKind.INTEGER))
ZERO_MIN = tl.constexpr(int(ZeroKind.MIN))
ZERO_CODEBOOK = tl.constexpr(int(ZeroKind.CODEBOOK))


def _move(register: str, value: float, *, is_bfloat16: bool = False) -> str:
    """The line that puts a value into both halves of a register."""
    return f"""
        mov.b32 {register}, 0x{_float_bits(value, is_bfloat16=is_bfloat16) * 0x10001:08x};"""


def _float_bits(value: float, *, is_bfloat16: bool) -> int:
    """The 16 bits of a value that the type holds (the layout rounds codebooks before they come here)."""
    if is_bfloat16:
        return int.from_bytes(struct.pack("<f", value), "little") >> 16
    return int.from_bytes(struct.pack("<e", value), "little")


def _subtract4_f16_text(low0: str, high1: str, low2: str, high3: str, setup: str = "") -> str:
    """Planes of 4-bit codes in float16. low: 1024 + z; high: -(64 + z), for the planes read 16 times as big."""
    return f"""{{
        .reg .b32 upper, a, b, c, d, sixteenth, low, high;{setup}
        lop3.b32 a, $4, 0x000f000f, 0x64006400, 0xea;
        lop3.b32 b, $4, 0x00f000f0, 0x64006400, 0xea;
        shr.u32 upper, $4, 8;
        lop3.b32 c, upper, 0x000f000f, 0x64006400, 0xea;
        lop3.b32 d, upper, 0x00f000f0, 0x64006400, 0xea;
        mov.b32 sixteenth, 0x2c002c00;
        sub.rn.f16x2 $0, a, {low0};
        fma.rn.f16x2 $1, b, sixteenth, {high1};
        sub.rn.f16x2 $2, c, {low2};
        fma.rn.f16x2 $3, d, sixteenth, {high3};
        }}"""


def _subtract4_bf16_text(lows: Sequence[str], setup: str = "") -> str:
    """Planes of 4-bit codes in bfloat16. lows: -(128 + z). fma, because sub.bf16x2 needs sm_90."""
    planes = "".join(
        f"""
        shr.u32 t, $4, {4 * plane};
        lop3.b32 t, t, 0x000f000f, 0x43004300, 0xea;
        fma.rn.bf16x2 ${plane}, t, one, {low};"""
        for plane, low in enumerate(lows)
    )
    return f"""{{
        .reg .b32 t, one, low;
        mov.b32 one, 0x3f803f80;{setup}{planes}
        }}"""


def _subtract2_f16_text(low0: str, low1: str, setup: str = "") -> str:
    """Planes of 8-bit codes in float16. low: 1024 + z."""
    return f"""{{
        .reg .b32 t, a, b, low;{setup}
        lop3.b32 a, $2, 0x00ff00ff, 0x64006400, 0xea;
        shr.u32 t, $2, 8;
        lop3.b32 b, t, 0x00ff00ff, 0x64006400, 0xea;
        sub.rn.f16x2 $0, a, {low0};
        sub.rn.f16x2 $1, b, {low1};
        }}"""


def _subtract2_bf16_text(low: int, high: int) -> str:
    """Planes of 8-bit codes in bfloat16, whose mantissa cannot hold 128 + q.

    Each half of a code, less its half of the zero point (low, high), is exact, and so is their sum.
    """
    planes = "".join(
        f"""
        shr.u32 t, $2, {8 * plane};
        lop3.b32 a, t, 0x000f000f, 0x43004300, 0xea;
        fma.rn.bf16x2 a, a, one, low;
        shr.u32 t, $2, {8 * plane + 4};
        lop3.b32 b, t, 0x000f000f, 0x43004300, 0xea;
        fma.rn.bf16x2 b, b, sixteen, high;
        fma.rn.bf16x2 ${plane}, b, one, a;"""
        for plane in range(2)
    )
    return f"""{{
        .reg .b32 t, a, b, one, sixteen, low, high;
        mov.b32 one, 0x3f803f80;
        mov.b32 sixteen, 0x41804180;{_move("low", -128 - low, is_bfloat16=True)}
        {_move("high", -16 * (128 + high), is_bfloat16=True).strip()}{planes}
        }}"""


SUBTRACT4_F16 = tl.constexpr(_subtract4_f16_text("$5", "$6", "$7", "$8"))
SUBTRACT4_BF16 = tl.constexpr(_subtract4_bf16_text(("$5", "$6", "$7", "$8")))
SUBTRACT2_F16 = tl.constexpr(_subtract2_f16_text("$3", "$4"))


@triton.jit
def _subtract4_f16(words, low0, high1, low2, high3):
    return tl.inline_asm_elementwise(
        SUBTRACT4_F16,
        "=r,=r,=r,=r,r,r,r,r,r",
        [words, low0, high1, low2, high3],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _subtract4_bf16(words, low0, low1, low2, low3):
    return tl.inline_asm_elementwise(
        SUBTRACT4_BF16,
        "=r,=r,=r,=r,r,r,r,r,r",
        [words, low0, low1, low2, low3],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _subtract2_f16(words, low0, low1):
    return tl.inline_asm_elementwise(
        SUBTRACT2_F16,
        "=r,=r,r,r,r",
        [words, low0, low1],
        dtype=(tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )


@cache
def assembly_for(scheme: Scheme) -> str:
    """The assembly that makes a weight's planes out of its words alone.

    For integer zero points, which are operands, it subtracts nothing.
    """
    is_bfloat16 = scheme.dtype == torch.bfloat16
    if scheme.codebook is not None:
        return look_up_assembly(scheme.codebook, is_bfloat16=is_bfloat16)
    zero = 0 if scheme.zero == ZeroKind.INTEGER else scheme.zero_value
    return constant_assembly(scheme.bits, zero, is_bfloat16=is_bfloat16)


def constant_assembly(bits: int, zero: int, *, is_bfloat16: bool) -> str:
    """The assembly that turns a register of two words into 16 / bits planes ``q - zero``."""
    if bits == 8 and is_bfloat16:
        return _subtract2_bf16_text(zero % 16, zero // 16)
    if bits == 8:
        return _subtract2_f16_text("low", "low", _move("low", 1024 + zero))
    if is_bfloat16:
        return _subtract4_bf16_text(("low",) * 4, _move("low", -128 - zero, is_bfloat16=True))
    return _subtract4_f16_text("low", "high", "low", "high", _move("low", 1024 + zero) + _move("high", -64 - zero))


def look_up_assembly(codebook: Sequence[float], *, is_bfloat16: bool) -> str:
    """The assembly that turns two words into four planes of codebook entries, with the table as immediates.

    Codes 0 to 7 and 8 to 15 are picked from two tables and merged by the code's top bit; low and high bytes apart.
    """
    low0, low1, high0, high1 = _byte_tables(codebook, is_bfloat16=is_bfloat16)

    def half_word(source: str, first: str, second: str) -> str:
        return f"""
        and.b32 s, {source}, 0x7777;
        shr.u32 m, {source}, 3;
        and.b32 m, m, 0x1111;
        prmt.b32 m, upper, 0, m;
        prmt.b32 lo, {low0[0]}, {low0[1]}, s;
        prmt.b32 t, {low1[0]}, {low1[1]}, s;
        lop3.b32 lo, m, t, lo, 0xca;
        prmt.b32 hi, {high0[0]}, {high0[1]}, s;
        prmt.b32 t, {high1[0]}, {high1[1]}, s;
        lop3.b32 hi, m, t, hi, 0xca;
        prmt.b32 {first}, lo, hi, 0x5140;
        prmt.b32 {second}, lo, hi, 0x7362;"""

    return f"""{{
        .reg .b32 s, m, t, lo, hi, ax, ay, bx, by, odd, upper;
        mov.b32 upper, 0x0000ff00;
        shr.u32 odd, $4, 16;{half_word("$4", "ax", "ay")}{half_word("odd", "bx", "by")}
        prmt.b32 $0, ax, bx, 0x5410;
        prmt.b32 $1, ax, bx, 0x7632;
        prmt.b32 $2, ay, by, 0x5410;
        prmt.b32 $3, ay, by, 0x7632;
        }}"""


def _byte_tables(codebook: Sequence[float], *, is_bfloat16: bool) -> list[tuple[str, str]]:
    """Low bytes of entries 0-7 and 8-15, then high bytes, each as two 32-bit immediates."""
    bits = [_float_bits(value, is_bfloat16=is_bfloat16) for value in codebook]
    tables = []
    for shift in (0, 8):
        for first in (0, 8):
            data = bytes((b >> shift) & 255 for b in bits[first : first + 8])
            low, high = struct.unpack("<II", data)
            tables.append((f"0x{low:08x}", f"0x{high:08x}"))
    return tables


@triton.jit
def _assembled4_f16(words, ASSEMBLY: tl.constexpr):
    return tl.inline_asm_elementwise(
        ASSEMBLY,
        "=r,=r,=r,=r,r",
        [words],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _assembled4_bf16(words, ASSEMBLY: tl.constexpr):
    return tl.inline_asm_elementwise(
        ASSEMBLY,
        "=r,=r,=r,=r,r",
        [words],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _assembled2_f16(words, ASSEMBLY: tl.constexpr):
    return tl.inline_asm_elementwise(ASSEMBLY, "=r,=r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2)


@triton.jit
def _assembled2_bf16(words, ASSEMBLY: tl.constexpr):
    return tl.inline_asm_elementwise(
        ASSEMBLY, "=r,=r,r", [words], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2
    )


@triton.jit
def assembled(words, BITS: tl.constexpr, STORED: tl.constexpr, ASSEMBLY: tl.constexpr):
    """All planes by the host's assembly, which needs nothing but the words."""
    if BITS == 4 and STORED == tl.float16:
        return _assembled4_f16(words, ASSEMBLY)
    elif BITS == 4:
        return _assembled4_bf16(words, ASSEMBLY)
    elif STORED == tl.float16:
        return _assembled2_f16(words, ASSEMBLY)
    else:
        return _assembled2_bf16(words, ASSEMBLY)


@triton.jit
def _codes(words, PLANE: tl.constexpr, BITS: tl.constexpr):
    return (words >> (BITS * PLANE)) & ((1 << BITS) - 1)


@triton.jit
def _plain(words, zero, PLANE: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    return _codes(words, PLANE, BITS).to(DTYPE) - zero.to(DTYPE)


@triton.jit
def _plain_look_up(words, PLANE: tl.constexpr, CODEBOOK: tl.constexpr, DTYPE: tl.constexpr):
    codes = _codes(words, PLANE, 4)
    values = tl.zeros(codes.shape, tl.float32)
    for i in tl.static_range(16):
        values = tl.where(codes == i, CODEBOOK[i], values)
    return values.to(DTYPE)


@triton.jit
def planes4(words, z0, z1, z2, z3, STORED: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Four planes ``q - z`` of 4-bit codes, each [rows, columns] in DTYPE.

    Args:
        words: int16 [rows, columns].
        z0, z1, z2, z3: each plane's zero point, integers of 0 to 16 in STORED, [1, columns] or [1, 1].
    """
    if not ASM:
        return (
            _plain(words, z0, 0, 4, DTYPE),
            _plain(words, z1, 1, 4, DTYPE),
            _plain(words, z2, 2, 4, DTYPE),
            _plain(words, z3, 3, 4, DTYPE),
        )
    elif STORED == tl.float16:
        low = tl.full([1, 1], 1024.0, tl.float16)
        high = tl.full([1, 1], -64.0, tl.float16)
        return _subtract4_f16(words, low + z0, high - z1, low + z2, high - z3)
    else:
        low = tl.full([1, 1], -128.0, tl.bfloat16)
        return _subtract4_bf16(words, low - z0, low - z1, low - z2, low - z3)


@triton.jit
def planes2(words, z0, z1, STORED: tl.constexpr, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr, ASM: tl.constexpr):
    """Two planes ``q - z`` of 8-bit codes; zero points of 0 to 255. ASSEMBLY subtracts nothing. Else as `planes4`."""
    if not ASM:
        return _plain(words, z0, 0, 8, DTYPE), _plain(words, z1, 1, 8, DTYPE)
    elif STORED == tl.float16:
        low = tl.full([1, 1], 1024.0, tl.float16)
        return _subtract2_f16(words, low + z0, low + z1)
    else:
        q0, q1 = _assembled2_bf16(words, ASSEMBLY)
        return q0 - z0, q1 - z1


@triton.jit
def planes4_codebook(words, CODEBOOK: tl.constexpr, DTYPE: tl.constexpr):
    """Four planes ``CODEBOOK[q]``, plain; CODEBOOK is a tuple of 16 floats that the activations' type holds."""
    return (
        _plain_look_up(words, 0, CODEBOOK, DTYPE),
        _plain_look_up(words, 1, CODEBOOK, DTYPE),
        _plain_look_up(words, 2, CODEBOOK, DTYPE),
        _plain_look_up(words, 3, CODEBOOK, DTYPE),
    )
