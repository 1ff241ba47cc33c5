"""silu(gate) * up after a matmul that left [gate | up], with the sum of its partial results on the way in.

Specification: `reference.silu_mul`. The columns may be stored in another order, which undoes the activation order of
the matmul that follows (where it has not been folded into the weights at load).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quant_kernels.launching import launch_options, stored_dtype

BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def silu_mul_kernel(
    x_ptr,
    places_ptr,
    out_ptr,
    num_columns,
    stride_split,
    SPLIT_K: tl.constexpr,
    PERMUTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x [SPLIT_K, M, 2 N], out [M, N]; column c goes to places[c]."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < num_columns
    gate = tl.zeros((BLOCK,), tl.float32)
    up = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLIT_K):
        gate_ptrs = x_ptr + split * stride_split + row * 2 * num_columns + columns
        gate += tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
        up += tl.load(gate_ptrs + num_columns, mask=mask, other=0.0).to(tl.float32)
    product = gate / (1.0 + tl.exp(-gate)) * up
    places = columns
    if PERMUTED:
        places = tl.load(places_ptr + columns, mask=mask, other=0)
    tl.store(out_ptr + row * num_columns + places, product.to(out_ptr.dtype.element_ty), mask=mask)


def silu_mul(x: torch.Tensor, dtype: torch.dtype, places: torch.Tensor | None = None) -> torch.Tensor:
    """silu(gate) * up of partial sums.

    Args:
        x: [S, M, 2 N] holding [gate | up], any float dtype, contiguous.
        dtype: of the result.
        places: int32 [N], where each column goes; None keeps them.

    Returns:
        [M, N].
    """
    splits, rows, width = x.shape
    assert x.is_contiguous(), "rows must lie side by side"
    columns = width // 2
    out = x.new_empty(rows, columns, dtype=stored_dtype(dtype))
    silu_mul_kernel[(rows, triton.cdiv(columns, BLOCK))](
        x,
        out if places is None else places,
        out,
        columns,
        rows * width,
        SPLIT_K=splits,
        PERMUTED=places is not None,
        BLOCK=BLOCK,
        **launch_options(NUM_WARPS),
    )
    return out.to(dtype)
