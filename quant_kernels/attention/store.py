"""From the qkv matmul to attention in one launch: sum, norm of q and k, rope, and keys and values into the cache.

Reads what the matmul leaves (a result, or the partial sums of a split), writes rotated queries, and stores keys and
values as `kv_format` describes, quantized on the way. Rope is half-split: pairs are (i, i + head_dim / 2), which are
also the two bytes of a word of keys.

Specification: `qengine.layers`' torch operations, by way of `kv_format.write`. Invariant: everything is computed in
float32 and rounded once. A slot below zero belongs to a row that fills a batch up: nothing is stored for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from quant_kernels.attention.kv_format import KVFormat, KVKind, LayerCache, turned_together
from quant_kernels.attention.words import E4M3, INT8, PLAIN, pack_byte, scale_of, scale_value
from quant_kernels.launching import interpreting, launch_options, stored_dtype

#: Numbers that a program holds, over all its heads, and heads at most.
_BLOCK, _MOST_HEADS = 512, 8
BFLOAT16_BITS = tl.constexpr(2)


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMSNorm of each head of q and of k before rope: weights [2, head_dim], q's first."""

    weights: torch.Tensor
    eps: float


@triton.jit
def _rounded_bfloat16(x):
    """float32 to bfloat16, to the nearest: the interpreter's own conversion cuts off."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _store_number(pointers, x, mask, ROUND: tl.constexpr):
    if ROUND:
        tl.store(pointers, _rounded_bfloat16(x), mask=mask)
    else:
        tl.store(pointers, x.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def _quotients(low, high, scales_ptr, scale_offset, KIND: tl.constexpr):
    """Both halves of each head divided by the head's scale, which is stored."""
    if KIND == INT8 or KIND == E4M3:
        largest = tl.maximum(tl.max(tl.abs(low), axis=1), tl.max(tl.abs(high), axis=1))
        # A maximum passes over NaN, but it must show: by the scale, which is all that is looked at later.
        largest += tl.sum(low * 0.0 + high * 0.0, axis=1)
        bits = scale_of(largest, KIND)
        tl.store(scales_ptr + scale_offset, bits.to(tl.int16))
        scale = scale_value(bits)[:, None]
        return low / scale, high / scale
    else:
        return low, high


@triton.jit
def _mixed(x, HEADS: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr):
    """Sums and differences of numbers STRIDE apart: one step of a fast Hadamard transform."""
    pairs = tl.permute(tl.reshape(x, (HEADS, BLOCK // (2 * STRIDE), 2, STRIDE)), (0, 1, 3, 2))
    first, second = tl.split(pairs)
    mixed = tl.join(first + second, first - second)
    return tl.reshape(tl.permute(mixed, (0, 1, 3, 2)), (HEADS, BLOCK))


@triton.jit
def _turned(low, high, HEADS: tl.constexpr, BLOCK: tl.constexpr, TURNED: tl.constexpr):
    """Both halves of heads times the matrix of `kv_format.turn`, which mixes TURNED neighbours of each half."""
    low, high = low + high, low - high
    if TURNED >= 2:
        low, high = _mixed(low, HEADS, BLOCK, 1), _mixed(high, HEADS, BLOCK, 1)
    if TURNED >= 4:
        low, high = _mixed(low, HEADS, BLOCK, 2), _mixed(high, HEADS, BLOCK, 2)
    if TURNED >= 8:
        low, high = _mixed(low, HEADS, BLOCK, 4), _mixed(high, HEADS, BLOCK, 4)
    if TURNED >= 16:
        low, high = _mixed(low, HEADS, BLOCK, 8), _mixed(high, HEADS, BLOCK, 8)
    if TURNED >= 32:
        low, high = _mixed(low, HEADS, BLOCK, 16), _mixed(high, HEADS, BLOCK, 16)
    if TURNED >= 64:
        low, high = _mixed(low, HEADS, BLOCK, 32), _mixed(high, HEADS, BLOCK, 32)
    if TURNED >= 128:
        low, high = _mixed(low, HEADS, BLOCK, 64), _mixed(high, HEADS, BLOCK, 64)
    size = (2.0 * TURNED) ** -0.5
    return low * size, high * size


# Head counts need not be multiples of 16; the head size, a constant, tells the compiler what is aligned.
@triton.jit(do_not_specialize=["num_rows", "num_heads", "num_kv_heads"])
def rope_store_kernel(
    x_ptr,
    positions_ptr,
    slots_ptr,
    cos_ptr,
    sin_ptr,
    norms_ptr,
    query_ptr,
    keys_ptr,
    values_ptr,
    scales_ptr,
    num_rows,
    num_heads,
    num_kv_heads,
    eps,
    SPLIT_K: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KIND: tl.constexpr,
    NORM: tl.constexpr,
    TURNED: tl.constexpr,
    ROUND: tl.constexpr,
):
    """x [SPLIT_K, M, (num_heads + 2 num_kv_heads) HEAD_DIM], query [M, num_heads, HEAD_DIM], tables float32
    [positions, HEAD_DIM / 2], keys and values as in `kv_format` (values of words as bytes).

    A program takes HEADS neighbouring heads of a row, all of q, all of k, or all of v. TURNED is 0 where keys are
    stored as they are.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    row = tl.program_id(0)
    first = tl.program_id(1) * HEADS
    heads = first + tl.arange(0, HEADS)
    dims = tl.arange(0, BLOCK)
    mask = (dims < HALF)[None, :]
    width = (num_heads + 2 * num_kv_heads) * HEAD_DIM
    offsets = heads[:, None] * HEAD_DIM + dims[None, :]
    low = tl.zeros((HEADS, BLOCK), tl.float32)
    high = tl.zeros((HEADS, BLOCK), tl.float32)
    for split in tl.static_range(SPLIT_K):
        row_ptr = x_ptr + (split * num_rows + row).to(tl.int64) * width
        low += tl.load(row_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        high += tl.load(row_ptr + offsets + HALF, mask=mask, other=0.0).to(tl.float32)

    if first < num_heads + num_kv_heads:
        if NORM:
            squares = tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)
            scale = 1.0 / tl.sqrt(squares / HEAD_DIM + eps)
            weights = norms_ptr + tl.where(first < num_heads, 0, HEAD_DIM) + dims[None, :]
            low *= scale[:, None] * tl.load(weights, mask=mask, other=0.0).to(tl.float32)
            high *= scale[:, None] * tl.load(weights + HALF, mask=mask, other=0.0).to(tl.float32)
        angle = tl.load(positions_ptr + row).to(tl.int64) * HALF + dims[None, :]
        cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
        sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
        low, high = low * cos - high * sin, high * cos + low * sin
        if TURNED > 0:
            low, high = _turned(low, high, HEADS, BLOCK, TURNED)

    if first < num_heads:
        query = query_ptr + row.to(tl.int64) * num_heads * HEAD_DIM + offsets
        tl.store(query, low.to(query_ptr.dtype.element_ty), mask=mask)
        tl.store(query + HALF, high.to(query_ptr.dtype.element_ty), mask=mask)
    else:
        slot = tl.load(slots_ptr + row).to(tl.int64)
        if slot >= 0:
            block, token = slot // BLOCK_SIZE, slot % BLOCK_SIZE
            if first < num_heads + num_kv_heads:
                kv_heads = heads - num_heads
                scale_offset = ((block * num_kv_heads + kv_heads) * BLOCK_SIZE + token) * 2
                _store_key(keys_ptr, scales_ptr, low, high, slot * num_kv_heads + kv_heads, scale_offset,
                           dims, mask, HALF, KIND, ROUND)  # fmt: skip
            else:
                kv_heads = heads - num_heads - num_kv_heads
                scale_offset = ((block * num_kv_heads + kv_heads) * BLOCK_SIZE + token) * 2 + 1
                _store_value(values_ptr, scales_ptr, low, high, block, token, kv_heads, num_kv_heads,
                             scale_offset, dims, mask, HALF, BLOCK_SIZE, KIND, ROUND)  # fmt: skip


@triton.jit
def _store_key(
    keys_ptr, scales_ptr, low, high, place, scale_offset, dims, mask, HALF: tl.constexpr, KIND: tl.constexpr,
    ROUND: tl.constexpr,
):  # fmt: skip
    if KIND == PLAIN:
        pointers = keys_ptr + place[:, None] * (2 * HALF) + dims[None, :]
        _store_number(pointers, low, mask, ROUND)
        _store_number(pointers + HALF, high, mask, ROUND)
    else:
        low, high = _quotients(low, high, scales_ptr, scale_offset, KIND)
        word = pack_byte(low, KIND) | (pack_byte(high, KIND) << 8)
        tl.store(keys_ptr + place[:, None] * HALF + dims[None, :], word.to(tl.int16), mask=mask)


@triton.jit
def _store_value(
    values_ptr, scales_ptr, low, high, block, token, kv_heads, num_kv_heads, scale_offset, dims, mask,
    HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr, KIND: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    if KIND == PLAIN:
        place = (block * BLOCK_SIZE + token) * num_kv_heads + kv_heads
        pointers = values_ptr + place[:, None] * (2 * HALF) + dims[None, :]
        _store_number(pointers, low, mask, ROUND)
        _store_number(pointers + HALF, high, mask, ROUND)
    else:
        low, high = _quotients(low, high, scales_ptr, scale_offset, KIND)
        PAIRS: tl.constexpr = BLOCK_SIZE // 2
        place = (block * PAIRS + token % PAIRS) * num_kv_heads + kv_heads
        bytes_ptr = values_ptr + (place[:, None] * (2 * HALF) + dims[None, :]) * 2 + token // PAIRS
        tl.store(bytes_ptr, pack_byte(low, KIND).to(tl.uint8), mask=mask)
        tl.store(bytes_ptr + 2 * HALF, pack_byte(high, KIND).to(tl.uint8), mask=mask)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a step's rows stand: int32 positions and slots [M], and rope's float32 tables [positions, head_dim / 2]."""

    positions: torch.Tensor
    slots: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


def rope_store(
    x: torch.Tensor,
    num_heads: int,
    cache: LayerCache,
    placement: Placement,
    dtype: torch.dtype,
    norms: HeadNorms | None = None,
) -> torch.Tensor:
    """Rotate queries and keys, and write keys and values to their slots.

    Args:
        x: [S, M, (num_heads + 2 num_kv_heads) head_dim], partial sums of [q | k | v], contiguous.
        cache: written to.
        dtype: of the queries.

    Returns:
        queries [M, num_heads, head_dim].
    """
    splits, rows, width = x.shape
    kv_heads, head_dim = cache.num_kv_heads, cache.head_dim
    assert x.is_contiguous(), "rows must lie side by side"
    assert width == (num_heads + 2 * kv_heads) * head_dim, f"{width} columns are not the heads of q, k and v"
    query = x.new_empty(rows, num_heads, head_dim, dtype=stored_dtype(dtype))
    constants = store_constants(cache.format, num_heads, kv_heads, head_dim, cache.block_size)
    keys, values, scales = _pointers(cache)
    rope_store_kernel[(rows, (num_heads + 2 * kv_heads) // constants["HEADS"])](
        x,
        placement.positions,
        placement.slots,
        placement.cos,
        placement.sin,
        placement.cos if norms is None else norms.weights,
        query,
        keys,
        values,
        scales,
        rows,
        num_heads,
        kv_heads,
        0.0 if norms is None else norms.eps,
        SPLIT_K=splits,
        NORM=norms is not None,
        ROUND=interpreting() and cache.format.dtype == torch.bfloat16,
        **constants,
        **store_options(constants),
    )
    return query.to(dtype)


def store_constants(
    kv_format: KVFormat, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int
) -> dict[str, Any]:
    """The constants that depend on the model and its cache."""
    block = triton.next_power_of_2(head_dim // 2)
    # A program's heads are all of one kind.
    heads = math.gcd(num_heads, num_kv_heads, _MOST_HEADS, max(1, _BLOCK // (2 * block)))
    return {
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "BLOCK": block,
        "BLOCK_SIZE": block_size,
        "KIND": int(kv_format.kind),
        "TURNED": turned_together(head_dim) if kv_format.is_turned else 0,
    }


def store_options(constants: dict[str, Any]) -> dict[str, Any]:
    """Triton's options: four pairs a thread."""
    return launch_options(max(1, constants["HEADS"] * constants["BLOCK"] // 128))


def _pointers(cache: LayerCache) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, values, and the bits of scales; where there are none, something of the right type."""
    if cache.format.kind == KVKind.PLAIN:
        return cache.keys, cache.values, cache.keys
    scales = cache.keys if cache.scales is None else cache.scales.view(torch.int16)
    return cache.keys, cache.values.view(torch.uint8), scales
