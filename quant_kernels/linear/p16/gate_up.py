"""silu(x Wg) * (x Wu) in one kernel: gate and up lie side by side in one P16 weight, and no sum leaves the chip.

One program computes the same columns of both halves, with x read once, so the product costs nothing and the output is
half as wide. For shapes that leave too few programs to fill a card, `matmul` with split-K and
`quant_kernels.elementwise.silu_mul`, which adds its partial sums up, are faster: `tuning.select` says which.

Specification: `quant_kernels.elementwise.reference.silu_mul` of the two linears. It does not split K.
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


@triton.jit(do_not_specialize=["M", "num_steps"])
def p16_gate_up_kernel(
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
    SCALE_WEIGHT: tl.constexpr,
    HALF_SUMS: tl.constexpr,
):
    """out[m, n] = silu(x[m] Wg[:, n]) * (x[m] Wu[:, n]); Wg is columns 0 .. N - 1 of the weight, Wu N .. 2 N - 1.

    N is a multiple of BN. x [M, K], out [M, N].
    """
    BLOCK: tl.constexpr = 16 // BITS * PLANE_ROWS
    ONE_GROUP: tl.constexpr = BLOCKS_PER_GROUP == 0
    num_n = N // BN
    rows = tl.program_id(0) // num_n * BM + tl.arange(0, BM)
    columns = tl.program_id(0) % num_n * BN + tl.arange(0, BN)
    inner = tl.arange(0, PLANE_ROWS)
    row_mask = rows[:, None] < M
    gate_ptrs = words_ptr + inner[:, None] * stride_words + columns[None, :]
    up_ptrs = gate_ptrs + N
    x_ptrs = x_ptr + rows[:, None].to(tl.int64) * stride_x + inner[None, :]
    limit = K
    gate = tl.zeros((BM, BN), dtype=tl.float32)
    up = tl.zeros((BM, BN), dtype=tl.float32)
    for step in range(num_steps):
        gate_words, up_words = tl.load(gate_ptrs), tl.load(up_ptrs)
        x = load_planes(x_ptrs, row_mask, inner, limit, BITS, EVEN_K, DTYPE)
        if ONE_GROUP:
            place = columns
        else:
            place = step // BLOCKS_PER_GROUP * stride_words + columns
        scale_word, offset_word = load_row(scales_ptr, offsets_ptr, place, ZERO)
        gate = multiply_step(
            gate, x, gate_words, scale_word, offset_word, BITS, GROUPS, ONE_GROUP, ZERO, ZERO_VALUE, CODEBOOK,
            ASSEMBLY, SCALE, STORED, DTYPE, ASM, SCALE_WEIGHT, HALF_SUMS,
        )  # fmt: skip
        scale_word, offset_word = load_row(scales_ptr, offsets_ptr, place + N, ZERO)
        up = multiply_step(
            up, x, up_words, scale_word, offset_word, BITS, GROUPS, ONE_GROUP, ZERO, ZERO_VALUE, CODEBOOK,
            ASSEMBLY, SCALE, STORED, DTYPE, ASM, SCALE_WEIGHT, HALF_SUMS,
        )  # fmt: skip
        gate_ptrs += PLANE_ROWS * stride_words
        up_ptrs += PLANE_ROWS * stride_words
        x_ptrs += BLOCK
        limit -= BLOCK
    if ONE_GROUP:
        gate *= tl.load(scales_ptr + columns)[None, :].to(tl.float32)
        up *= tl.load(scales_ptr + columns + N)[None, :].to(tl.float32)
    if HAS_BIAS:
        gate += tl.load(bias_ptr + columns)[None, :].to(tl.float32)
        up += tl.load(bias_ptr + columns + N)[None, :].to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    out_ptrs = out_ptr + rows[:, None].to(tl.int64) * stride_out + columns[None, :]
    tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=row_mask)


def gate_up(x: torch.Tensor, weight: P16Weight, tile: Tile, *, twin: bool = False) -> torch.Tensor:
    """silu(x Wg) * (x Wu) for a weight [Wg | Wu], with its bias.

    Args:
        x: [M, K] as for `matmul`.
        tile: block_n counts the columns of each half and must divide half the weight's outputs.

    Returns:
        [M, N / 2] in x's dtype, N being the weight's outputs.
    """
    rows, columns = x.shape[0], weight.out_features // 2
    assert x.shape[1] == weight.in_features, f"x has {x.shape[1]} columns, the weight {weight.in_features} rows"
    assert x.stride(1) == 1, "x must be contiguous along its columns"
    assert columns % tile.block_n == 0, f"{columns} columns do not fill {tile.name}"
    assert tile.word_rows == _PLANE_ROWS, "gate_up walks whole blocks"
    out = x.new_empty(rows, columns, dtype=stored_dtype(x.dtype))
    p16_gate_up_kernel[(triton.cdiv(rows, tile.block_m) * (columns // tile.block_n),)](
        x,
        weight.words,
        weight.scales,
        weight.scales if weight.offsets is None else weight.offsets,
        weight.words if weight.bias is None else weight.bias,
        out,
        rows,
        columns,
        weight.in_features,
        weight.num_blocks,
        x.stride(0),
        weight.words.stride(0),
        columns,
        EVEN_K=weight.in_features % weight.scheme.block_inputs == 0,
        HAS_BIAS=weight.bias is not None,
        BM=tile.block_m,
        BN=tile.block_n,
        **matmul_constants(weight.scheme, tile, x.dtype, twin=twin),
        **tile_options(tile),
    )
    return out.to(x.dtype)
