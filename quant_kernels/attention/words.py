"""Cache words in registers: two bytes of keys or values to two numbers, and numbers to bytes.

A word pairs bytes whose numbers belong to different halves (`kv_format`), so masking it in place yields one half each
and nothing changes lanes. The fast path works on two words in a 32-bit register, in float16 whatever the model's type,
since every byte is exact in it::

    int8   (w & 0x00ff00ff) | 0x64006400        =  1024 + byte, then minus 1152
    e4m3   sign where it is, the rest down by 1 =  value / 256       exponents 8 apart, and subnormals come out right
    e5m2   byte << 8                            =  value

What a number must still be multiplied by (`FACTORS`) joins the scales, which are applied to sums, not here.

Invariant: the fast path and its plain twin (ASM = False) give the same numbers, for all words. DTYPE is float16, or
float32 in the interpreter.
"""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl

from quant_kernels.attention.kv_format import E4M3_MAX as _E4M3_MAX
from quant_kernels.attention.kv_format import E5M2_MAX as _E5M2_MAX
from quant_kernels.attention.kv_format import MIN_SCALE as _MIN_SCALE
from quant_kernels.attention.kv_format import KVKind

PLAIN = tl.constexpr(int(KVKind.PLAIN))
INT8 = tl.constexpr(int(KVKind.INT8))
E4M3 = tl.constexpr(int(KVKind.E4M3))
E5M2 = tl.constexpr(int(KVKind.E5M2))
MIN_SCALE = tl.constexpr(_MIN_SCALE)
E4M3_MAX = tl.constexpr(_E4M3_MAX)
E5M2_MAX = tl.constexpr(_E5M2_MAX)

#: What unpacked numbers are short of.
FACTORS: Mapping[KVKind, float] = {KVKind.PLAIN: 1.0, KVKind.INT8: 1.0, KVKind.E4M3: 256.0, KVKind.E5M2: 1.0}

INT8_TEXT = tl.constexpr(
    """{
        .reg .b32 low, high, zero;
        mov.b32 zero, 0x64806480;
        lop3.b32 low, $2, 0x00ff00ff, 0x64006400, 0xea;
        shr.u32 high, $2, 8;
        lop3.b32 high, high, 0x00ff00ff, 0x64006400, 0xea;
        sub.rn.f16x2 $0, low, zero;
        sub.rn.f16x2 $1, high, zero;
        }"""
)
E4M3_TEXT = tl.constexpr(
    """{
        .reg .b32 sign, rest;
        shl.b32 rest, $2, 8;
        and.b32 sign, rest, 0x80008000;
        shr.u32 rest, rest, 1;
        lop3.b32 $0, rest, 0x3f803f80, sign, 0xea;
        and.b32 sign, $2, 0x80008000;
        shr.u32 rest, $2, 1;
        lop3.b32 $1, rest, 0x3f803f80, sign, 0xea;
        }"""
)
E5M2_TEXT = tl.constexpr(
    """{
        .reg .b32 low;
        shl.b32 low, $2, 8;
        and.b32 $0, low, 0xff00ff00;
        and.b32 $1, $2, 0xff00ff00;
        }"""
)
#: Without the detour for subnormal numbers, which scales never are.
LOG2_TEXT = tl.constexpr("lg2.approx.ftz.f32 $0, $2; rcp.approx.ftz.f32 $1, $2;")
CONSTRAINTS = tl.constexpr("=r,=r,r")


@triton.jit
def _half(byte, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """An int32 byte as a number."""
    if KIND == INT8:
        return (byte - 128).to(DTYPE)
    elif KIND == E4M3:
        bits = ((byte & 0x80) << 8) | ((byte & 0x7F) << 7)
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(DTYPE)
    else:
        return (byte << 8).to(tl.int16).to(tl.float16, bitcast=True).to(DTYPE)


@triton.jit
def unpack(words, KIND: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """int16 words to the numbers of their low and of their high bytes, each in the words' shape."""
    if not ASM:
        bits = words.to(tl.int32)
        return _half(bits & 0xFF, KIND, DTYPE), _half((bits >> 8) & 0xFF, KIND, DTYPE)
    elif KIND == INT8:
        return tl.inline_asm_elementwise(INT8_TEXT, CONSTRAINTS, [words], (tl.float16, tl.float16), True, 2)
    elif KIND == E4M3:
        return tl.inline_asm_elementwise(E4M3_TEXT, CONSTRAINTS, [words], (tl.float16, tl.float16), True, 2)
    else:
        return tl.inline_asm_elementwise(E5M2_TEXT, CONSTRAINTS, [words], (tl.float16, tl.float16), True, 2)


@triton.jit
def _to_float8(x, LARGEST: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """float32 to a byte of sign, exponent and MANTISSA bits, rounded to the nearest, ties to even; clipped."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = tl.minimum(tl.abs(x), LARGEST)
    size_bits = size.to(tl.int32, bitcast=True)
    SHIFT: tl.constexpr = 23 - MANTISSA
    rounded = size_bits + (1 << (SHIFT - 1)) - 1 + ((size_bits >> SHIFT) & 1)
    normal = (rounded >> SHIFT) - ((127 - BIAS) << MANTISSA)
    # Adding a number whose last bit is the subnormals' step leaves the count of steps in its last bits.
    STEP: tl.constexpr = 2.0 ** (24 - BIAS - MANTISSA)
    subnormal = (size + STEP).to(tl.int32, bitcast=True) - ((127 + 24 - BIAS - MANTISSA) << 23)
    return sign | tl.where(size < 2.0 ** (1 - BIAS), subnormal, normal)


@triton.jit
def scale_of(largest, KIND: tl.constexpr):
    """The scale of numbers up to `largest` (float32) as the bits of a bfloat16, rounded up; NaN stays NaN."""
    if KIND == INT8:
        quotient = largest / 127.0
    else:
        quotient = largest / E4M3_MAX
    bits = (tl.where(quotient < MIN_SCALE, MIN_SCALE, quotient).to(tl.int32, bitcast=True) + 0xFFFF) >> 16
    return tl.where(quotient == quotient, bits, 0x7FC0)


@triton.jit
def scale_value(bits):
    """The bits of a bfloat16 in the lower half of an int32, as float32."""
    return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def scale_values(word):
    """A key's and a value's scale from an int32 that holds both."""
    return scale_value(word), (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def log2_and_inverse(scale, ASM: tl.constexpr):
    """log2(scale) and 1 / scale of normal numbers, approximately (2^-21): the two halves of moving a scale."""
    if ASM:
        return tl.inline_asm_elementwise(LOG2_TEXT, "=r,=r,r", [scale], (tl.float32, tl.float32), True, 1)
    else:
        return tl.log2(scale), 1.0 / scale


@triton.jit
def pack_byte(quotient, KIND: tl.constexpr):
    """float32 numbers, already divided by their scale, to bytes in int32."""
    if KIND == INT8:
        # The last bits of 1.5 * 2^23 + x are x, rounded to the nearest integer.
        return (quotient + 12583040.0).to(tl.int32, bitcast=True) & 0xFF
    elif KIND == E4M3:
        return _to_float8(quotient, E4M3_MAX, 3, 7)
    else:
        return _to_float8(quotient, E5M2_MAX, 2, 15)
