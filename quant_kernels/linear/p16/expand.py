"""A slice of a P16 weight as a plain matrix, for the sizes of x at which the vendor's dense matmul wins.

Specification: `quant_kernels.reference.dequantize`, rounded once more where the scale is multiplied in. Invariant: a
weight is expanded a slice of columns at a time into scratch memory of bounded size. Rows stay in stored order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quant_kernels.launching import launch_options, stored_dtype
from quant_kernels.linear.p16.constants import scheme_constants
from quant_kernels.linear.p16.layout import P16Weight
from quant_kernels.linear.p16.steps import PLANE_ROWS, load_row, scaled_plane, weight_planes

#: Scratch for one slice of columns. Large enough for a dense matmul at full rate, small beside any model.
SCRATCH_BYTES = 64 * 2**20
BLOCK_N = 128
NUM_WARPS = 4


@triton.jit(do_not_specialize=["num_columns"])
def p16_expand_kernel(
    words_ptr,
    scales_ptr,
    offsets_ptr,
    out_ptr,
    K,
    num_columns,
    stride_words,
    stride_out,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCKS_PER_GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    ZERO_VALUE: tl.constexpr,
    CODEBOOK: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    SCALE: tl.constexpr,
    STORED: tl.constexpr,
    DTYPE: tl.constexpr,
    ASM: tl.constexpr,
    BN: tl.constexpr,
):
    """out[k, n] = W[k, n] for the first num_columns columns from where the pointers stand."""
    PLANES: tl.constexpr = 16 // BITS
    PER_GROUP: tl.constexpr = PLANES // GROUPS
    block = tl.program_id(1)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    inner = tl.arange(0, PLANE_ROWS)
    words = tl.load(words_ptr + (block * PLANE_ROWS + inner[:, None]) * stride_words + columns[None, :])
    if BLOCKS_PER_GROUP == 0:
        place = columns
    else:
        place = block // BLOCKS_PER_GROUP * stride_words + columns
    scale_word, offset_word = load_row(scales_ptr, offsets_ptr, place, ZERO)
    w = weight_planes(words, offset_word, BITS, GROUPS, ZERO, ZERO_VALUE, CODEBOOK, ASSEMBLY, STORED, DTYPE, ASM)
    for j in tl.static_range(PLANES):
        rows = block * (PLANES * PLANE_ROWS) + j * PLANE_ROWS + inner[:, None]
        values = scaled_plane(w[j], scale_word, offset_word, j // PER_GROUP, GROUPS, ZERO, ZERO_VALUE, SCALE, DTYPE)
        out_ptrs = out_ptr + rows.to(tl.int64) * stride_out + columns[None, :]
        tl.store(out_ptrs, values.to(out_ptr.dtype.element_ty), mask=(rows < K) & (columns[None, :] < num_columns))


def expand(
    weight: P16Weight, first: int, num_columns: int, out: torch.Tensor | None = None, *, twin: bool = False
) -> torch.Tensor:
    """Columns first .. first + num_columns - 1 of the weight as [K, num_columns] in the scheme's dtype.

    Args:
        first: a multiple of 128, so that loads stay aligned.
        out: where to write; the first num_columns columns of a larger buffer may be given.
    """
    assert first % BLOCK_N == 0, "slices start at whole tiles"
    dtype = stored_dtype(weight.scheme.dtype)
    if out is None:
        out = torch.empty(weight.in_features, num_columns, dtype=dtype, device=weight.words.device)
    scales = weight.scales[:, first:]
    p16_expand_kernel[(triton.cdiv(num_columns, BLOCK_N), weight.num_blocks)](
        weight.words[:, first:],
        scales,
        scales if weight.offsets is None else weight.offsets[:, first:],
        out,
        weight.in_features,
        num_columns,
        weight.words.stride(0),
        out.stride(0),
        BN=BLOCK_N,
        **scheme_constants(weight.scheme, twin=twin),
        **launch_options(NUM_WARPS),
    )
    return out.to(weight.scheme.dtype)


def expanded_matmul(x: torch.Tensor, weight: P16Weight, *, twin: bool = False) -> torch.Tensor:
    """x [M, K] times the weight, plus its bias, through slices of plain weights: [M, N] in x's dtype."""
    step = slice_columns(weight.in_features)
    out = x.new_empty(x.shape[0], weight.out_features)
    for first in range(0, weight.out_features, step):
        last = min(first + step, weight.out_features)
        torch.mm(x, expand(weight, first, last - first, twin=twin).to(x.dtype), out=out[:, first:last])
    return out if weight.bias is None else out.add_(weight.bias.to(out.dtype))


def slice_columns(in_features: int) -> int:
    """Columns of a 16-bit matrix of `in_features` rows that fit the scratch memory, in whole tiles."""
    return max(BLOCK_N, SCRATCH_BYTES // (2 * in_features) // BLOCK_N * BLOCK_N)
