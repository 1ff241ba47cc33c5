"""One step of a matmul over P16: a strip of words becomes planes of weights, and those join the sum.

Shared by the kernels of `matmul` and `gate_up`, which own the loops and the pointers. Rows of the tables are as
`layout` describes them: one 16-bit field per group of the block.

Invariant: sums are in float32; with SCALE_WEIGHT = False the tensor cores multiply exact integers, and a group's sum
is scaled once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quant_kernels.linear.p16.planes import (
    ZERO_CODEBOOK,
    ZERO_INTEGER,
    ZERO_MIN,
    assembled,
    planes2,
    planes4,
    planes4_codebook,
)
from quant_kernels.scheme import PLANE_ROWS as _PLANE_ROWS

PLANE_ROWS = tl.constexpr(_PLANE_ROWS)


@triton.jit
def load_row(scales_ptr, offsets_ptr, place, ZERO: tl.constexpr):
    """The words of scales and of zero points or mins at `place` [columns]; the scales' twice where there are none."""
    scale_word = tl.load(scales_ptr + place)
    if ZERO == ZERO_INTEGER or ZERO == ZERO_MIN:
        return scale_word, tl.load(offsets_ptr + place)
    else:
        return scale_word, scale_word


@triton.jit
def field(word, INDEX: tl.constexpr, GROUPS: tl.constexpr, TYPE: tl.constexpr):
    """Field INDEX of a table's word [columns], as TYPE [1, columns]."""
    if GROUPS == 1:
        return word[None, :]
    else:
        return (word >> (16 * INDEX)).to(tl.int16).to(TYPE, bitcast=True)[None, :]


@triton.jit
def weight_planes(
    words,
    zero_word,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    ZERO: tl.constexpr,
    ZERO_VALUE: tl.constexpr,
    CODEBOOK: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    STORED: tl.constexpr,
    DTYPE: tl.constexpr,
    ASM: tl.constexpr,
):
    """int16 words [rows, columns] to 16 / BITS planes of unscaled weights, each [rows, columns] in DTYPE.

    `zero_word` is read for integer zero points alone. Codes of weights with mins are centred by ZERO_VALUE.
    """
    if ZERO == ZERO_INTEGER and BITS == 4:
        z0 = field(zero_word, 0, GROUPS, STORED)
        z1 = field(zero_word, GROUPS // 4, GROUPS, STORED)
        z2 = field(zero_word, GROUPS // 2, GROUPS, STORED)
        z3 = field(zero_word, GROUPS - 1, GROUPS, STORED)
        return planes4(words, z0, z1, z2, z3, STORED, DTYPE, ASM)
    elif ZERO == ZERO_INTEGER:
        z0 = field(zero_word, 0, GROUPS, STORED)
        z1 = field(zero_word, GROUPS - 1, GROUPS, STORED)
        return planes2(words, z0, z1, STORED, DTYPE, ASSEMBLY, ASM)
    elif ASM:
        return assembled(words, BITS, STORED, ASSEMBLY)
    elif ZERO == ZERO_CODEBOOK:
        return planes4_codebook(words, CODEBOOK, DTYPE)
    elif BITS == 4:
        zero = tl.full([1, 1], ZERO_VALUE, DTYPE)
        return planes4(words, zero, zero, zero, zero, STORED, DTYPE, ASM)
    else:
        zero = tl.full([1, 1], ZERO_VALUE, DTYPE)
        return planes2(words, zero, zero, STORED, DTYPE, ASSEMBLY, ASM)


@triton.jit
def _load_plane(x_ptrs, row_mask, inner, limit, PLANE: tl.constexpr, EVEN_K: tl.constexpr, DTYPE: tl.constexpr):
    if EVEN_K:
        mask = row_mask
    else:
        mask = row_mask & (inner[None, :] + PLANE * PLANE_ROWS < limit)
    return tl.load(x_ptrs + PLANE * PLANE_ROWS, mask=mask, other=0.0).to(DTYPE)


@triton.jit
def load_planes(x_ptrs, row_mask, inner, limit, BITS: tl.constexpr, EVEN_K: tl.constexpr, DTYPE: tl.constexpr):
    """The activations that meet each plane: 16 / BITS tiles [BM, rows]; inputs from `limit` on are zero."""
    if BITS == 4:
        return (
            _load_plane(x_ptrs, row_mask, inner, limit, 0, EVEN_K, DTYPE),
            _load_plane(x_ptrs, row_mask, inner, limit, 1, EVEN_K, DTYPE),
            _load_plane(x_ptrs, row_mask, inner, limit, 2, EVEN_K, DTYPE),
            _load_plane(x_ptrs, row_mask, inner, limit, 3, EVEN_K, DTYPE),
        )
    else:
        return (
            _load_plane(x_ptrs, row_mask, inner, limit, 0, EVEN_K, DTYPE),
            _load_plane(x_ptrs, row_mask, inner, limit, 1, EVEN_K, DTYPE),
        )


@triton.jit
def scaled_plane(
    plane,
    scale_word,
    min_word,
    INDEX: tl.constexpr,
    GROUPS: tl.constexpr,
    ZERO: tl.constexpr,
    ZERO_VALUE: tl.constexpr,
    SCALE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """One plane times its group's scale, plus the min where there is one, rounded to DTYPE."""
    scale = field(scale_word, INDEX, GROUPS, SCALE)
    if ZERO == ZERO_MIN:
        # The plane is centred, so the min is too: what is added stays small, and so does its rounding.
        centre = field(min_word, INDEX, GROUPS, SCALE).to(tl.float32) + scale.to(tl.float32) * ZERO_VALUE
        return plane * scale.to(DTYPE) + centre.to(DTYPE)
    else:
        return plane * scale.to(DTYPE)


@triton.jit
def multiply_step(
    acc,
    x,
    words,
    scale_word,
    offset_word,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    ZERO_VALUE: tl.constexpr,
    CODEBOOK: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    SCALE: tl.constexpr,
    STORED: tl.constexpr,
    DTYPE: tl.constexpr,
    ASM: tl.constexpr,
    SCALE_WEIGHT: tl.constexpr,
    HALF_SUMS: tl.constexpr,
):
    """acc [BM, BN] float32 plus the planes x of activations times the weights of words [rows, BN].

    ONE_GROUP leaves the scale to the end of the loop. HALF_SUMS adds up a step in float16 and only steps in float32:
    twice the tensor cores' rate on GeForce cards, at the risk of overflow.
    """
    PLANES: tl.constexpr = 16 // BITS
    PER_GROUP: tl.constexpr = PLANES // GROUPS
    w = weight_planes(words, offset_word, BITS, GROUPS, ZERO, ZERO_VALUE, CODEBOOK, ASSEMBLY, STORED, DTYPE, ASM)
    for j in tl.static_range(PLANES):
        if ONE_GROUP:
            acc = tl.dot(x[j], w[j], acc)
        elif SCALE_WEIGHT:
            scaled = scaled_plane(w[j], scale_word, offset_word, j // PER_GROUP, GROUPS, ZERO, ZERO_VALUE, SCALE, DTYPE)
            if not HALF_SUMS:
                acc = tl.dot(x[j], scaled, acc)
            elif j == 0:
                part = tl.dot(x[j], scaled, out_dtype=tl.float16)
            else:
                part = tl.dot(x[j], scaled, part, out_dtype=tl.float16)
        else:
            if j % PER_GROUP == 0:
                part = tl.dot(x[j], w[j])
            else:
                part = tl.dot(x[j], w[j], part)
            if j % PER_GROUP == PER_GROUP - 1:
                acc += part * field(scale_word, j // PER_GROUP, GROUPS, SCALE).to(tl.float32)
    if HALF_SUMS:
        acc += part.to(tl.float32)
    return acc
