"""x times a P16 weight: the kernel for every M up to where expanding the weight is cheaper, and its launcher.

One program computes a tile of the output over one share of K. With several shares (split-K) the partial sums go out in
float32, [shares, M, N], and whoever reads them adds them up: the kernels of `quant_kernels.elementwise` do that on the
way in, so a split costs no launch, no atomics and no cleared buffer, and sums are the same on every run.

Specification: `quant_kernels.reference.linear`, to the tolerance of docs/kernels.md. Invariant: a row's result does not
depend on the rows beside it. It does not gather activations (`perm`) and does not choose a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quant_kernels.launching import stored_dtype
from quant_kernels.linear.p16.constants import matmul_constants, tile_options
from quant_kernels.linear.p16.layout import P16Weight
from quant_kernels.linear.p16.steps import PLANE_ROWS, load_planes, load_row, multiply_step
from quant_kernels.scheme import PLANE_ROWS as _PLANE_ROWS
from quant_kernels.tuning.tile import Tile


@triton.jit(do_not_specialize=["M", "num_steps", "steps_per_split"])
def p16_matmul_kernel(
    x_ptr,
    words_ptr,
    scales_ptr,
    offsets_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    num_steps,
    steps_per_split,
    stride_x,
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
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP_M: tl.constexpr,
    SCALE_WEIGHT: tl.constexpr,
    HALF_SUMS: tl.constexpr,
):
    """out[split, m, n] = sum over this split's k of x[m, k] W[k, n], plus the bias in split 0.

    x [M, K], words and tables as in `layout`, out [splits, M, N]; strides in elements, the last one 1. A split takes
    whole blocks: steps_per_split is a multiple of the steps in a block.
    """
    BLOCK: tl.constexpr = 16 // BITS * PLANE_ROWS
    STRIPS: tl.constexpr = PLANE_ROWS // ROWS
    ONE_GROUP: tl.constexpr = BLOCKS_PER_GROUP == 0
    # A 16-bit row is too narrow for an asynchronous copy: it is asked for one step ahead instead.
    AHEAD: tl.constexpr = GROUPS == 1 and BLOCKS_PER_GROUP == 1 and STRIPS == 1

    num_m, num_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    tile, split = tl.program_id(0), tl.program_id(1)
    band = tile // (GROUP_M * num_n)
    band_rows = tl.minimum(num_m - band * GROUP_M, GROUP_M)
    within = tile % (GROUP_M * num_n)
    rows = (band * GROUP_M + within % band_rows) * BM + tl.arange(0, BM)
    columns = within // band_rows * BN + tl.arange(0, BN)
    inner = tl.arange(0, ROWS)

    # Rounding up can leave a last split without work: it stays inside the tables and stores zeros.
    first = tl.minimum(split * steps_per_split, num_steps)
    last = tl.minimum(first + steps_per_split, num_steps)
    first_input = first // STRIPS * BLOCK
    row_mask = rows[:, None] < M
    word_ptrs = words_ptr + (first * ROWS + inner[:, None]) * stride_words + columns[None, :]
    x_ptrs = x_ptr + rows[:, None].to(tl.int64) * stride_x + first_input + inner[None, :]
    limit = K - first_input
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    if AHEAD:
        next_scale, next_offset = load_row(scales_ptr, offsets_ptr, first * stride_words + columns, ZERO)
    for step in range(first, last):
        words = tl.load(word_ptrs)
        x = load_planes(x_ptrs, row_mask, inner, limit, BITS, EVEN_K, DTYPE)
        if AHEAD:
            scale_word, offset_word = next_scale, next_offset
            next_scale, next_offset = load_row(scales_ptr, offsets_ptr, (step + 1) * stride_words + columns, ZERO)
        elif ONE_GROUP:
            scale_word, offset_word = load_row(scales_ptr, offsets_ptr, columns, ZERO)
        else:
            row = step // STRIPS // BLOCKS_PER_GROUP
            scale_word, offset_word = load_row(scales_ptr, offsets_ptr, row * stride_words + columns, ZERO)
        acc = multiply_step(
            acc, x, words, scale_word, offset_word, BITS, GROUPS, ONE_GROUP, ZERO, ZERO_VALUE, CODEBOOK, ASSEMBLY,
            SCALE, STORED, DTYPE, ASM, SCALE_WEIGHT, HALF_SUMS,
        )  # fmt: skip
        word_ptrs += ROWS * stride_words
        advance = BLOCK if STRIPS == 1 else tl.where(step % 2 == 0, ROWS, BLOCK - ROWS)
        x_ptrs += advance
        limit -= advance
    if ONE_GROUP:
        acc *= tl.load(scales_ptr + columns)[None, :].to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
        acc += tl.where(split == 0, bias, 0.0)[None, :]
    out_ptrs = out_ptr + (split * M + rows[:, None]).to(tl.int64) * stride_out + columns[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=row_mask & (columns[None, :] < N))


def matmul(x: torch.Tensor, weight: P16Weight, tile: Tile, split_k: int = 1, *, twin: bool = False) -> torch.Tensor:
    """x times the weight, plus its bias.

    Args:
        x: [M, K] in the scheme's dtype, columns in the weight's stored order, rows contiguous.
        tile: block_n must divide the weight's padded columns.
        split_k: shares of K.
        twin: compute with plain Triton instead of assembly.

    Returns:
        [1, M, N] in x's dtype, or float32 [split_k, M, N] to be added up.
    """
    rows, columns = x.shape[0], weight.out_features
    assert x.shape[1] == weight.in_features, f"x has {x.shape[1]} columns, the weight {weight.in_features} rows"
    assert x.stride(1) == 1, "x must be contiguous along its columns"
    assert weight.words.shape[1] % tile.block_n == 0, f"{weight.words.shape[1]} columns do not fill {tile.name}"
    out = x.new_empty(split_k, rows, columns, dtype=stored_dtype(x.dtype) if split_k == 1 else torch.float32)
    strips = _PLANE_ROWS // tile.word_rows
    num_tiles = triton.cdiv(rows, tile.block_m) * triton.cdiv(columns, tile.block_n)
    p16_matmul_kernel[(num_tiles, split_k)](
        x,
        weight.words,
        weight.scales,
        weight.scales if weight.offsets is None else weight.offsets,
        weight.words if weight.bias is None else weight.bias,
        out,
        rows,
        columns,
        weight.in_features,
        weight.num_blocks * strips,
        triton.cdiv(weight.num_blocks, split_k) * strips,
        x.stride(0),
        weight.words.stride(0),
        columns,
        EVEN_K=weight.in_features % weight.scheme.block_inputs == 0,
        HAS_BIAS=weight.bias is not None,
        BM=tile.block_m,
        BN=tile.block_n,
        ROWS=tile.word_rows,
        GROUP_M=tile.group_m,
        **matmul_constants(weight.scheme, tile, x.dtype, twin=twin),
        **tile_options(tile),
    )
    return out if split_k > 1 else out.to(x.dtype)
