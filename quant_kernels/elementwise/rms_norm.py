"""Residual addition and RMSNorm in one launch, with the sum of partial results before it and a permuted store after it.

``residual += sum_s x[s]; y = residual / sqrt(mean(residual^2) + eps) * weight``, one program a row, in float32 (the
norm: Zhang and Sennrich 2019). The order of the columns of y is free, which is where an activation order disappears.

Specification: `reference.add_rms_norm`. Invariant: the mean is that of the sum before it is rounded to the residual's
dtype; a row of up to 8,192 numbers stays in registers throughout, a longer one is read back for the second half.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from quant_kernels.launching import MAX_REGISTERS, launch_options, stored_dtype
from quant_kernels.tuning.card import REGISTERS_PER_SM

#: Columns that a program holds in registers at once.
MAX_BLOCK = 8192


@triton.jit
def _add_partial_sums(total, x_ptrs, mask, stride_split, SPLIT_K: tl.constexpr):
    # Some loads at once hide their latency; all of them would not fit the registers.
    TOGETHER: tl.constexpr = 4 if SPLIT_K % 4 == 0 else 1
    for first in tl.range(0, SPLIT_K, TOGETHER, num_stages=1):
        for i in tl.static_range(TOGETHER):
            total += tl.load(x_ptrs + (first + i) * stride_split, mask=mask, other=0.0).to(tl.float32)
    return total


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
    CHUNKS: tl.constexpr,
):
    """x [SPLIT_K, M, H], residual [M, H] read and written, out [M, H]; column c goes to places[c]."""
    row = tl.program_id(0).to(tl.int64) * num_columns
    squares = 0.0
    for chunk in tl.static_range(CHUNKS):
        columns = chunk * BLOCK + tl.arange(0, BLOCK)
        mask = columns < num_columns
        total = tl.load(residual_ptr + row + columns, mask=mask, other=0.0).to(tl.float32)
        total = _add_partial_sums(total, x_ptr + row + columns, mask, stride_split, SPLIT_K)
        squares += tl.sum(total * total, axis=0)
        tl.store(residual_ptr + row + columns, total.to(residual_ptr.dtype.element_ty), mask=mask)
    scale = 1.0 / tl.sqrt(squares / num_columns + eps)
    if CHUNKS > 1:
        tl.debug_barrier()
    for chunk in tl.static_range(CHUNKS):
        columns = chunk * BLOCK + tl.arange(0, BLOCK)
        mask = columns < num_columns
        if CHUNKS > 1:
            total = tl.load(residual_ptr + row + columns, mask=mask, other=0.0).to(tl.float32)
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
    assert x.is_contiguous() and residual.is_contiguous(), "rows must lie side by side"  # noqa: PT018
    dtype = stored_dtype(residual.dtype)
    running = residual.to(dtype)
    out = torch.empty_like(running)
    block = min(MAX_BLOCK, triton.next_power_of_2(columns))
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
        CHUNKS=triton.cdiv(columns, block),
        **norm_options(block),
    )
    if running is not residual:
        residual.copy_(running)
    return out.to(residual.dtype)


def norm_options(block: int) -> dict[str, Any]:
    """Triton's options for `block` numbers at once: 16 of them a thread."""
    num_warps = min(16, max(4, block // 512))
    return launch_options(num_warps, max_registers=min(MAX_REGISTERS, REGISTERS_PER_SM // (32 * num_warps)))
