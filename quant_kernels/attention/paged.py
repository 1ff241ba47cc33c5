"""Attention over a paged KV cache in Triton: decode, prompt chunks and any mix of them in one launch.

A program takes items of `work`: a tile of query tokens with all query heads of one KV head (so a key is read once for
all of them), over one share of the keys the tile can see. It walks the block table, a tile of keys at a time, with the
running maximum and sum of a softmax (Milakov and Gimelshein 2018; Dao et al. 2022). Several shares of a tile leave
partial results; the program that ends last adds them up, in their order, so that nothing else is launched and the bits
do not depend on who was last.

Bytes are multiplied as they are (`words`), a half of each word in a matmul of its own. A key's scale is applied to its
score. A value's scale joins its score as a logarithm: the weights that meet the tensor cores then stay within [0, 1],
however small the values are, and the sum of the softmax takes the scale out again.

Specification: `reference.paged_attention`. Invariant: keys beyond a sequence's context never count, whatever their
slots hold. It does not write the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from quant_kernels.attention.kv_format import KVFormat, KVKind, LayerCache
from quant_kernels.attention.words import FACTORS, PLAIN, log2_and_inverse, scale_values, unpack
from quant_kernels.attention.work import NUM_FIELDS as _NUM_FIELDS
from quant_kernels.launching import interpreting, launch_options, stored_dtype
from quant_kernels.tuning.attention import MAX_ORDERED_ROWS, AttentionTile

NUM_FIELDS = tl.constexpr(_NUM_FIELDS)
#: exp is computed as exp2, and scores carry this factor.
LOG2_E = tl.constexpr(1.4426950408889634)
#: Numbers of a head that a program holds at least: a half of them must be as long as the tensor cores' sums, 16.
MIN_BLOCK_D = 32
_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def _scores(products, scale, softcap, SOFTCAP: tl.constexpr):
    """Products of queries and keys as exponents of 2; softcap bends them by tanh, here out of exp2."""
    if SOFTCAP:
        bent = 1.0 - 2.0 / (tl.exp2(products * scale * (2.0 * LOG2_E / softcap)) + 1.0)
        return bent * (softcap * LOG2_E)
    else:
        return products * (scale * LOG2_E)


@triton.jit
def _visible(keys, queries, end, window, WINDOW: tl.constexpr):
    """Which keys each row attends to."""
    mask = (keys[None, :] <= queries[:, None]) & (keys < end)[None, :]
    if WINDOW:
        mask = mask & (keys[None, :] > queries[:, None] - window)
    return mask


@triton.jit
def _weights(scores, base):
    return tl.exp2(scores - base[:, None])


@triton.jit
def _plain_step(
    acc, total, top, query, start, end, blocks_ptr, key_ptr, value_ptr, key_strides, value_strides, dims, queries,
    first_query, last_query, window, scale, softcap, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    KEYS: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One tile of keys of a cache of floats."""
    keys = start + tl.arange(0, KEYS)
    # Keys past the end are read from the last one's slot, so that no load needs a mask.
    inside = tl.minimum(keys, end - 1)
    block = tl.load(blocks_ptr + inside // BLOCK_SIZE).to(tl.int64)
    token = inside % BLOCK_SIZE
    key_ptrs = key_ptr + (block * key_strides[0] + token * key_strides[1])[None, :] + dims[:, None]
    value_ptrs = value_ptr + (block * value_strides[0] + token * value_strides[1])[:, None] + dims[None, :]
    if HEAD_DIM == BLOCK_D:
        key = tl.load(key_ptrs).to(DTYPE)
        value = tl.load(value_ptrs).to(DTYPE)
    else:
        key = tl.load(key_ptrs, mask=(dims < HEAD_DIM)[:, None], other=0.0).to(DTYPE)
        value = tl.load(value_ptrs, mask=(dims < HEAD_DIM)[None, :], other=0.0).to(DTYPE)
    scores = _scores(tl.dot(query, key, input_precision="ieee"), scale, softcap, SOFTCAP)
    if _needs_mask(start, KEYS, first_query, last_query, window, WINDOW):
        scores = tl.where(_visible(keys, queries, end, window, WINDOW), scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = _weights(scores, base)
    fade = tl.exp2(top - base)
    total = total * fade + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(DTYPE), value, acc * fade[:, None], input_precision="ieee")
    return acc, total, new_top


@triton.jit
def _needs_mask(start, KEYS: tl.constexpr, first_query, last_query, window, WINDOW: tl.constexpr):
    if WINDOW:
        return (start + KEYS > first_query + 1) | (start <= last_query - window)
    else:
        return start + KEYS > first_query + 1


@triton.jit
def _half_of_keys(
    low_query, high_query, key_ptr, scales_ptr, block, token, keys, key_strides, scale_block,
    pairs, queries, start, end, first_query, last_query, window, scale, softcap, HEAD_DIM: tl.constexpr,
    BLOCK_P: tl.constexpr, KEYS: tl.constexpr, KIND: tl.constexpr, FACTOR: tl.constexpr, SCALED: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Scores of those keys of a tile whose values share a half of their words, and what their values lack."""
    pointers = key_ptr + (block * key_strides[0] + token * key_strides[1])[None, :] + pairs[:, None]
    if HEAD_DIM == 2 * BLOCK_P:
        words = tl.load(pointers)
    else:
        words = tl.load(pointers, mask=(pairs < HEAD_DIM // 2)[:, None], other=0)
    low, high = unpack(words, KIND, DTYPE, ASM)
    products = tl.dot(low_query, low, input_precision="ieee")
    products = tl.dot(high_query, high, products, input_precision="ieee")
    if SCALED:
        key_scales, value_scales = scale_values(tl.load(scales_ptr + block * scale_block + token))
        # A slot that was never written has no sound scale; keys past the end must not bring one in.
        value_scales = tl.where(keys < end, value_scales * FACTOR, 1.0)
        logs, inverses = log2_and_inverse(value_scales, ASM)
        scores = _scores(products * (key_scales * FACTOR)[None, :], scale, softcap, SOFTCAP) + logs[None, :]
    else:
        inverses = keys
        scores = _scores(products * FACTOR, scale, softcap, SOFTCAP)
    if _needs_mask(start, KEYS, first_query, last_query, window, WINDOW):
        scores = tl.where(_visible(keys, queries, end, window, WINDOW), scores, float("-inf"))
    return scores, inverses


@triton.jit
def _sum(weights, inverses, SCALED: tl.constexpr):
    if SCALED:
        return tl.sum(weights * inverses[None, :], axis=1)
    else:
        return tl.sum(weights, axis=1)


@triton.jit
def _word_step(
    acc, total, top, low_query, high_query, start, end, blocks_ptr, key_ptr, value_ptr, scales_ptr,
    key_strides, value_strides, scale_block, dims, pairs, queries, first_query, last_query, window,
    scale, softcap, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, KIND: tl.constexpr, FACTOR: tl.constexpr, SCALED: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One tile of keys of a cache of bytes: first the tokens in the low halves of the values' words, then the high."""
    HALF_SIZE: tl.constexpr = BLOCK_SIZE // 2
    rows = tl.arange(0, KEYS // 2)
    index = tl.minimum(start // BLOCK_SIZE + rows // HALF_SIZE, (end - 1) // BLOCK_SIZE)
    block = tl.load(blocks_ptr + index).to(tl.int64)
    token = rows % HALF_SIZE
    keys = start + rows // HALF_SIZE * BLOCK_SIZE + token
    low_scores, low_inverses = _half_of_keys(
        low_query, high_query, key_ptr, scales_ptr, block, token, keys, key_strides,
        scale_block, pairs, queries, start, end, first_query, last_query, window, scale, softcap, HEAD_DIM, BLOCK_P,
        KEYS, KIND, FACTOR, SCALED, WINDOW, SOFTCAP, DTYPE, ASM,
    )  # fmt: skip
    high_scores, high_inverses = _half_of_keys(
        low_query, high_query, key_ptr, scales_ptr, block, token + HALF_SIZE,
        keys + HALF_SIZE, key_strides, scale_block, pairs, queries, start, end, first_query, last_query, window,
        scale, softcap, HEAD_DIM, BLOCK_P, KEYS, KIND, FACTOR, SCALED, WINDOW, SOFTCAP, DTYPE, ASM,
    )  # fmt: skip
    pointers = value_ptr + (block * value_strides[0] + token * value_strides[1])[:, None] + dims[None, :]
    if HEAD_DIM == BLOCK_D:
        words = tl.load(pointers)
    else:
        words = tl.load(pointers, mask=(dims < HEAD_DIM)[None, :], other=0)
    low, high = unpack(words, KIND, DTYPE, ASM)
    new_top = tl.maximum(top, tl.maximum(tl.max(low_scores, axis=1), tl.max(high_scores, axis=1)))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    fade = tl.exp2(top - base)
    low_weights, high_weights = _weights(low_scores, base), _weights(high_scores, base)
    total = total * fade + _sum(low_weights, low_inverses, SCALED) + _sum(high_weights, high_inverses, SCALED)
    acc = tl.dot(low_weights.to(DTYPE), low, acc * fade[:, None], input_precision="ieee")
    acc = tl.dot(high_weights.to(DTYPE), high, acc, input_precision="ieee")
    return acc, total, new_top


@triton.jit
def _write(
    acc, total, top, out_ptr, places_ptr, sinks_ptr, rows, heads, valid, dims, stride_out, HEAD_DIM: tl.constexpr,
    SINKS: tl.constexpr, PERMUTED: tl.constexpr,
):  # fmt: skip
    """The finished rows of a tile, columns where the next matmul wants them."""
    if SINKS:
        sinks = tl.load(sinks_ptr + heads, mask=valid, other=0.0).to(tl.float32)
        total += tl.exp2(sinks * LOG2_E - top)
    mask = valid[:, None] & (dims < HEAD_DIM)[None, :]
    places = heads[:, None] * HEAD_DIM + dims[None, :]
    if PERMUTED:
        places = tl.load(places_ptr + places, mask=mask, other=0)
    pointers = out_ptr + rows[:, None].to(tl.int64) * stride_out + places
    tl.store(pointers, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _leave_share(
    acc, total, top, sums_ptr, stats_ptr, places, valid, dims, num_places, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    mask = valid[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(sums_ptr + places[:, None] * HEAD_DIM + dims[None, :], acc, mask=mask)
    tl.store(stats_ptr + places, total, mask=valid)
    tl.store(stats_ptr + num_places + places, top, mask=valid)


@triton.jit
def _add_shares(
    sums_ptr, stats_ptr, places, stride, shares, valid, dims, num_places, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """All shares of a tile, in their order."""
    mask = valid[:, None] & (dims < HEAD_DIM)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for share in tl.range(0, shares, num_stages=1):
        here = places + share * stride
        share_top = tl.load(stats_ptr + num_places + here, mask=valid, other=float("-inf"))
        new_top = tl.maximum(top, share_top)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        fade, weight = tl.exp2(top - base), tl.exp2(share_top - base)
        total = total * fade + tl.load(stats_ptr + here, mask=valid, other=0.0) * weight
        part = tl.load(sums_ptr + here[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
        acc = acc * fade[:, None] + part * weight[:, None]
        top = new_top
    return acc, total, top


@triton.jit(do_not_specialize=["num_places", "window", "num_kv_heads"])
def paged_attention_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    scales_ptr,
    out_ptr,
    num_items_ptr,
    items_ptr,
    blocks_ptr,
    places_ptr,
    sinks_ptr,
    sums_ptr,
    stats_ptr,
    counters_ptr,
    num_places,
    stride_query,
    stride_out,
    window,
    scale,
    softcap,
    num_kv_heads,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    KEYS: tl.constexpr,
    KIND: tl.constexpr,
    FACTOR: tl.constexpr,
    SCALED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    PERMUTED: tl.constexpr,
    DTYPE: tl.constexpr,
    ASM: tl.constexpr,
):
    """query [M, num_heads, HEAD_DIM], caches as in `kv_format`, items as in `work`, out [M, num_heads * HEAD_DIM].

    Partial results: sums float32 [slots, num_heads, HEAD_DIM], stats [2, slots, num_heads] (sums of weights, maxima),
    counters int32 [slots, num_kv_heads], zero between launches; num_places is slots * num_heads.
    """
    BLOCK_P: tl.constexpr = BLOCK_D // 2
    kv_head = tl.program_id(1)
    dims = tl.arange(0, BLOCK_D)
    pairs = tl.arange(0, BLOCK_P)
    lane = tl.arange(0, BLOCK_M)
    num_heads = num_kv_heads * GROUP
    heads = kv_head * GROUP + lane % GROUP
    if KIND == PLAIN:
        key_strides = (BLOCK_SIZE * num_kv_heads * HEAD_DIM, num_kv_heads * HEAD_DIM)
        value_strides = key_strides
        key_ptr += kv_head * HEAD_DIM
    else:
        key_strides = (BLOCK_SIZE * num_kv_heads * (HEAD_DIM // 2), num_kv_heads * (HEAD_DIM // 2))
        value_strides = (BLOCK_SIZE // 2 * num_kv_heads * HEAD_DIM, num_kv_heads * HEAD_DIM)
        key_ptr += kv_head * (HEAD_DIM // 2)
        scales_ptr += kv_head * BLOCK_SIZE
    value_ptr += kv_head * HEAD_DIM
    scale_block = num_kv_heads * BLOCK_SIZE

    for item in tl.range(tl.program_id(0), tl.load(num_items_ptr), tl.num_programs(0), num_stages=1):
        fields = items_ptr + item * NUM_FIELDS
        row, tokens, position = tl.load(fields), tl.load(fields + 1), tl.load(fields + 2)
        table, first, end = tl.load(fields + 3), tl.load(fields + 4), tl.load(fields + 5)
        slot, share, shares = tl.load(fields + 6), tl.load(fields + 7), tl.load(fields + 8)
        valid = lane < tokens * GROUP
        rows = row + lane // GROUP
        queries = position + lane // GROUP
        last_query = position + tokens - 1
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        query_ptrs = query_ptr + (rows.to(tl.int64) * stride_query + heads * HEAD_DIM)[:, None]
        if KIND == PLAIN:
            query = tl.load(query_ptrs + dims[None, :], mask=valid[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
            query = query.to(DTYPE)
            for start in tl.range(first, end, KEYS):
                acc, total, top = _plain_step(
                    acc, total, top, query, start, end, blocks_ptr + table, key_ptr, value_ptr, key_strides,
                    value_strides, dims, queries, position, last_query, window, scale, softcap, HEAD_DIM, BLOCK_D,
                    KEYS, BLOCK_SIZE, WINDOW, SOFTCAP, DTYPE,
                )  # fmt: skip
        else:
            mask = valid[:, None] & (pairs < HEAD_DIM // 2)[None, :]
            low_query = tl.load(query_ptrs + pairs[None, :], mask=mask, other=0.0).to(DTYPE)
            high_query = tl.load(query_ptrs + HEAD_DIM // 2 + pairs[None, :], mask=mask, other=0.0).to(DTYPE)
            for start in tl.range(first, end, KEYS):
                acc, total, top = _word_step(
                    acc, total, top, low_query, high_query, start, end, blocks_ptr + table, key_ptr, value_ptr,
                    scales_ptr, key_strides, value_strides, scale_block, dims, pairs, queries,
                    position, last_query, window, scale, softcap, HEAD_DIM, BLOCK_D, BLOCK_P, KEYS, BLOCK_SIZE, KIND,
                    FACTOR, SCALED, WINDOW, SOFTCAP, DTYPE, ASM,
                )  # fmt: skip
        if shares > 1:
            stride = tokens * num_heads
            places = (slot + lane // GROUP) * num_heads + heads
            _leave_share(acc, total, top, sums_ptr, stats_ptr, places + share * stride, valid, dims, num_places,
                         HEAD_DIM)  # fmt: skip
            # Every thread's share is in memory before one of them says so; the last to say it sees all others'.
            tl.debug_barrier()
            counter = counters_ptr + slot * num_kv_heads + kv_head
            if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == shares - 1:
                tl.debug_barrier()
                acc, total, top = _add_shares(sums_ptr, stats_ptr, places, stride, shares, valid, dims, num_places,
                                              HEAD_DIM, BLOCK_M, BLOCK_D)  # fmt: skip
                _write(acc, total, top, out_ptr, places_ptr, sinks_ptr, rows, heads, valid, dims, stride_out,
                       HEAD_DIM, SINKS, PERMUTED)  # fmt: skip
                tl.store(counter, 0)
        else:
            _write(acc, total, top, out_ptr, places_ptr, sinks_ptr, rows, heads, valid, dims, stride_out, HEAD_DIM,
                   SINKS, PERMUTED)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Work:
    """A step's items on the device, for layers that share a window.

    Attributes:
        num_items: int32 [1], how many of the items count.
        items: int32 [at least num_items, NUM_FIELDS].
        programs: to launch per KV head; each takes every programs-th item.
    """

    num_items: torch.Tensor
    items: torch.Tensor
    programs: int


@dataclass(frozen=True, slots=True)
class Scratch:
    """Room for partial results; counters are zero between launches. Shapes as the kernel says."""

    sums: torch.Tensor
    stats: torch.Tensor
    counters: torch.Tensor

    @classmethod
    def make(cls, num_slots: int, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device) -> Scratch:
        """Room for `num_slots` query tokens."""
        sums = torch.empty(num_slots, num_heads, head_dim, dtype=torch.float32, device=device)
        stats = torch.empty(2, num_slots, num_heads, dtype=torch.float32, device=device)
        return cls(sums, stats, torch.zeros(num_slots, num_kv_heads, dtype=torch.int32, device=device))

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.sums, self.stats, self.counters))


@dataclass(frozen=True, slots=True)
class Rule:
    """How scores are made, beside the products of queries and keys.

    Attributes:
        scale: of the products.
        window: a token sees itself and window - 1 tokens before it; None for all.
        softcap: bends scores to within +-softcap by tanh; None for none.
        sinks: float [num_heads], a score that takes part in each head's softmax and has no value; None for none.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None


def paged_attention(
    query: torch.Tensor,
    cache: LayerCache,
    blocks: torch.Tensor,
    work: Work,
    scratch: Scratch,
    rule: Rule,
    tile: AttentionTile,
    places: torch.Tensor | None = None,
    *,
    twin: bool = False,
) -> torch.Tensor:
    """Attention of all rows of a step; keys and values of this step are already in the cache.

    Args:
        query: [M, num_heads, head_dim], contiguous.
        blocks: int32, the block ids of all sequences; items say where each one's begin.
        work: made for this rule's window and this tile.
        places: int32 [num_heads * head_dim]: where the columns go, for the linear that follows.
        twin: unpack bytes in plain Triton instead of assembly.

    Returns:
        [M, num_heads * head_dim] in the query's dtype. Rows that are in no item hold whatever was there.
    """
    rows, num_heads, head_dim = query.shape
    kv_heads = cache.num_kv_heads
    out = query.new_empty(rows, num_heads * head_dim, dtype=stored_dtype(query.dtype))
    places_now = places if tile.block_m <= MAX_ORDERED_ROWS else None
    # Both scales of a token are one int32.
    scales = cache.keys if cache.scales is None else cache.scales.view(torch.int32)
    paged_attention_kernel[(work.programs, kv_heads)](
        query,
        cache.keys,
        cache.values,
        scales,
        out,
        work.num_items,
        work.items,
        blocks,
        blocks if places_now is None else places_now,
        query if rule.sinks is None else rule.sinks,
        scratch.sums,
        scratch.stats,
        scratch.counters,
        scratch.sums.shape[0] * num_heads,
        query.stride(0),
        num_heads * head_dim,
        0 if rule.window is None else rule.window,
        rule.scale,
        1.0 if rule.softcap is None else rule.softcap,
        kv_heads,
        GROUP=num_heads // kv_heads,
        WINDOW=rule.window is not None,
        SOFTCAP=rule.softcap is not None,
        SINKS=rule.sinks is not None,
        PERMUTED=places_now is not None,
        **attention_constants(cache.format, tile, head_dim, cache.block_size, query.dtype, twin=twin),
        **launch_options(tile.num_warps, tile.num_stages),
    )
    if places is not None and places_now is None:
        out = torch.empty_like(out).index_copy_(1, places.long(), out)
    return out.to(query.dtype)


def attention_constants(
    kv_format: KVFormat, tile: AttentionTile, head_dim: int, block_size: int, dtype: torch.dtype, *, twin: bool = False
) -> dict[str, Any]:
    """The constants that depend on the cache, the tile and the queries' dtype."""
    interpreted = interpreting()
    compute = kv_format.dtype or torch.float16
    # Assembly makes float16 of bytes, whatever meets them.
    takes_float32 = interpreted or kv_format.kind == KVKind.PLAIN
    if (dtype == torch.float32 and takes_float32) or (interpreted and torch.bfloat16 in (compute, dtype)):
        compute = torch.float32
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(MIN_BLOCK_D, triton.next_power_of_2(head_dim)),
        "BLOCK_SIZE": block_size,
        "BLOCK_M": tile.block_m,
        "KEYS": tile.keys,
        "KIND": int(kv_format.kind),
        "FACTOR": FACTORS[KVKind(kv_format.kind)],
        "SCALED": kv_format.is_scaled,
        "DTYPE": _TYPES[compute],
        "ASM": not (twin or interpreted) and kv_format.kind != KVKind.PLAIN,
    }
