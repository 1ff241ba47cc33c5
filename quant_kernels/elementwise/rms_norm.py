"""Residual addition and RMSNorm in one launch, with the sum of partial results before it and a permuted store after it.

``residual += sum_s x[s]; y = residual / sqrt(mean(residual^2) + eps) * weight``, one program a row, in float32 (the
norm: Zhang and Sennrich 2019). The order of the columns of y is free, which is where an activation order disappears.

Specification: `reference.add_rms_norm`. Invariant: y is made of the sum before it is rounded to the residual's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from quant_kernels.linear.p16.launch import MAX_REGISTERS, stored_dtype, warp_options
from quant_kernels.tuning.card import REGISTERS_PER_SM

#: Columns a program can hold in registers.
MAX_COLUMNS = 16384


@triton.jit
def add_rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    places_ptr,
    out_ptr,
    num_columns,
    stride_split,
    eps,
    SPLIT_K: tl.constexpr,
    PERMUTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x [SPLIT_K, M, H], residual [M, H] read and written, out [M, H]; column c goes to places[c]."""
    row = tl.program_id(0).to(tl.int64) * num_columns
    columns = tl.arange(0, BLOCK)
    mask = columns < num_columns
    total = tl.load(residual_ptr + row + columns, mask=mask, other=0.0).to(tl.float32)
    for split in tl.static_range(SPLIT_K):
        total += tl.load(x_ptr + split * stride_split + row + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(residual_ptr + row + columns, total.to(residual_ptr.dtype.element_ty), mask=mask)
    scale = 1.0 / tl.sqrt(tl.sum(total * total, axis=0) / num_columns + eps)
    normed = total * scale * tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    places = columns
    if PERMUTED:
        places = tl.load(places_ptr + columns, mask=mask, other=0)
    tl.store(out_ptr + row + places, normed.to(out_ptr.dtype.element_ty), mask=mask)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, places: torch.Tensor | None = None
) -> torch.Tensor:
    """Add the partial sums `x` to the residual in place, and return its norm.

    Args:
        x: [S, M, H], any float dtype, contiguous.
        residual: [M, H], contiguous; changed.
        weight: [H].
        places: int32 [H], where each column goes: the inverse of the next matmul's `perm`. None keeps them.

    Returns:
        [M, H] in the residual's dtype.
    """
    splits, rows, columns = x.shape
    if columns > MAX_COLUMNS:
        raise ValueError(f"rows of {columns} numbers, expected at most {MAX_COLUMNS}")
    assert x.is_contiguous() and residual.is_contiguous(), "rows must lie side by side"  # noqa: PT018
    dtype = stored_dtype(residual.dtype)
    running = residual.to(dtype)
    out = torch.empty_like(running)
    block = triton.next_power_of_2(columns)
    add_rms_norm_kernel[(rows,)](
        x,
        running,
        weight,
        weight if places is None else places,
        out,
        columns,
        rows * columns,
        eps,
        SPLIT_K=splits,
        PERMUTED=places is not None,
        BLOCK=block,
        **norm_options(block),
    )
    if running is not residual:
        residual.copy_(running)
    return out.to(residual.dtype)


def norm_options(block: int) -> dict[str, Any]:
    """Triton's options for rows of `block` numbers, which stay in registers from the sum to the store."""
    num_warps = 4 if block <= 4096 else 8 if block <= 8192 else 16
    return warp_options(num_warps, min(MAX_REGISTERS, REGISTERS_PER_SM // (32 * num_warps)))
