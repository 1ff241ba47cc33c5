"""Filters and draws one token per row of logits without sorting, in one launch, one program a row.

The order that a sort would give is needed only where a filter ends. Distances from the largest logit are never
negative, and the bits of such floats, read as integers (*keys* below), are ordered as the floats are; so the end of a
filter is found by bisection over integers, which is exact and stops after a known number of passes: each splits the
interval in PIVOTS + 1 parts, and PIVOTS = 4 needs 14 passes for 31 bits. What makes those passes short:

1. One pass finds the largest logit, its token and the total weight. It does so in BLOCK independent lanes, and keeps
   each lane's maximum. Greedy rows end here. Rows without a filter are drawn from in a second pass, which stops at the
   token.
2. The k-th largest of the lanes' maxima is at most the k-th largest logit, and those maxima that hold top_p of the
   total weight lie at or below the end of top_p. So bisection over BLOCK numbers bounds the filters from below, tightly
   where fewer tokens are kept than there are lanes.
3. A second pass copies what lies above the bound, in the order of ids. Usually that is a few tokens, and filters and
   draw go on in the copy. Where it is more than CAPACITY, they go over the row itself: slow, and right.

Sums are float32 in BLOCK lanes, added up in a tree at the end, so that an addend passes through vocab / BLOCK +
log2(BLOCK) additions: 43 for 128,256 tokens, a relative error below 43 * 2^-24 = 2.6e-6 at worst and about 1e-7 as it
falls out. The weights they add are good to about (1 + distance / temperature) * 2^-23 each. The running sum of the draw
is compensated (Knuth 1969, two-sum) from block to block.

Specification: `reference`. Invariant: a row's token depends on its own logits and parameters alone, bit for bit; the
order of additions does not depend on how many rows there are.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from quant_kernels.launching import MAX_REGISTERS, launch_options
from quant_kernels.tuning.card import REGISTERS_PER_SM

#: Lanes of a program: logits that are looked at together.
BLOCK = 4096
NUM_WARPS = 16
#: Tokens that the copy of a row's likeliest can hold, and the lanes that look at them.
CAPACITY = 8192
COPY_BLOCK = 1024
#: Places at which one pass of the bisection splits its interval.
PIVOTS = 4

_LOG2_E = tl.constexpr(1.4426950408889634)
#: Key of the largest finite distance. Tokens beyond it have no weight, like the padding of a row.
_LAST_KEY = tl.constexpr(0x7F7FFFFF)
#: Below any min_p that a float32 weight could be compared with; a smaller constant would be a float64 to Triton 3.6.
_LEAST_WEIGHT = tl.constexpr(2.0**-126)


@triton.jit
def _load_logits(ptr, offsets, count):
    return tl.load(ptr + offsets, mask=offsets < count, other=-float("inf")).to(tl.float32)


@triton.jit
def _key_of(top, logits):
    # The distance of 0.0 from -0.0 would be -0.0, whose bits are not those of 0.
    return tl.abs(top - logits).to(tl.int32, bitcast=True)


@triton.jit
def _keys(ptr, offsets, count, top):
    """The distances of some tokens as integers; that of infinity beyond `count`."""
    return _key_of(top, _load_logits(ptr, offsets, count))


@triton.jit
def _weights(keys, rate):
    return tl.exp2(-keys.to(tl.float32, bitcast=True) * rate)


@triton.jit
def _scan_row(row_ptr, vocab, rate, BLOCK: tl.constexpr):
    """Each lane's maximum; the row's maximum, the lowest token that has it, and the total weight.

    The total is NaN where a logit is NaN, or two are +inf.
    """
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    places = tl.zeros((BLOCK,), tl.int32)
    masses = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, vocab, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        logits = _load_logits(row_ptr, offsets, vocab)
        is_better = logits > best
        gap = tl.where(logits == -float("inf"), float("inf"), tl.abs(logits - best))
        # One exponential does for both: the old sum shrinks, or the new addend is small.
        share = tl.exp2(-gap * rate)
        masses = tl.where(is_better, masses * share + 1.0, masses + share)
        places = tl.where(is_better, offsets, places)
        best = tl.where(is_better, logits, best)
    top = tl.max(best, axis=0)
    token = tl.min(tl.where(best == top, places, vocab), axis=0)
    total = tl.sum(masses * tl.exp2((best - top) * rate), axis=0)
    return best, top, token, total


@triton.jit
def _search(ptr, count, top, rate, goal, last, BY_MASS: tl.constexpr, BLOCK: tl.constexpr, PIVOTS: tl.constexpr):
    """The least key such that the tokens up to it reach `goal`, and what those before it sum to; `last` if none does.

    Weights are summed, or tokens counted. Rounded sums grow with the pivot too, as rounding keeps the order, so that
    the interval always holds the answer.
    """
    first = tl.full((), -1, tl.int32)
    before = tl.full((), 0.0, tl.float32)
    while last - first > 1:
        step = (last - first + PIVOTS) // (PIVOTS + 1)
        pivots = tl.minimum(first + step * (1 + tl.arange(0, PIVOTS)), last - 1)
        sums = tl.zeros((PIVOTS, BLOCK), tl.float32)
        for start in tl.range(0, count, BLOCK):
            # Loaded as one row of `sums`, whose layout it then has.
            keys = _keys(ptr, start + tl.arange(0, BLOCK)[None, :], count, top)
            addends = tl.full((1, BLOCK), 1.0, tl.float32)
            if BY_MASS:
                addends = _weights(keys, rate)
            sums += tl.where(keys <= pivots[:, None], addends, 0.0)
        reached = tl.sum(sums, axis=1)
        is_short = reached < goal
        first = tl.maximum(first, tl.max(tl.where(is_short, pivots, -1), axis=0))
        before = tl.maximum(before, tl.max(tl.where(is_short, reached, 0.0), axis=0))
        last = tl.minimum(last, tl.min(tl.where(is_short, last, pivots), axis=0))
    return last, before


@triton.jit
def _mass(ptr, count, top, rate, limit, ties, BLOCK: tl.constexpr):
    """Weight of the tokens before `limit` and of at most `ties` at it."""
    sums = tl.zeros((BLOCK,), tl.float32)
    tied = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, count, BLOCK):
        keys = _keys(ptr, start + tl.arange(0, BLOCK), count, top)
        sums += tl.where(keys < limit, _weights(keys, rate), 0.0)
        tied += tl.where(keys == limit, 1.0, 0.0)
    return tl.sum(sums, axis=0) + tl.minimum(tl.sum(tied, axis=0), ties) * _weights(limit, rate)


@triton.jit
def _invert(ptr, count, top, rate, limit, ties, target, BLOCK: tl.constexpr):
    """The first place at which the cumulative weight of the kept tokens exceeds `target`; the last kept one at most.

    Kept are the tokens before `limit` and the first `ties` at it.
    """
    weight_at_limit = _weights(limit, rate)
    # Of the block that holds the place: its start, what lies before it, and how many may still be kept at the limit.
    found = 0
    found_before = tl.full((), 0.0, tl.float32)
    found_ties = ties
    total = tl.full((), 0.0, tl.float32)
    error = tl.full((), 0.0, tl.float32)
    start = 0
    while (start < count) & (total + error <= target):
        keys = _keys(ptr, start + tl.arange(0, BLOCK), count, top)
        tied = tl.sum(tl.where(keys == limit, 1.0, 0.0), axis=0)
        mass = tl.sum(tl.where(keys < limit, _weights(keys, rate), 0.0), axis=0)
        mass += tl.minimum(tied, ties) * weight_at_limit
        if mass > 0.0:
            found = start
            found_before = total + error
            found_ties = ties
        rounded = total + mass
        grown = rounded - total
        error += (total - (rounded - grown)) + (mass - grown)
        total = rounded
        ties = tl.maximum(ties - tied, 0.0)
        start += BLOCK
    offsets = found + tl.arange(0, BLOCK)
    keys = _keys(ptr, offsets, count, top)
    ranks = tl.cumsum((keys == limit).to(tl.int32), axis=0)
    is_kept = (keys < limit) | ((keys == limit) & (ranks <= found_ties))
    weights = tl.where(is_kept, _weights(keys, rate), 0.0)
    is_past = (tl.cumsum(weights, axis=0) > target - found_before) & (weights > 0.0)
    first_past = tl.min(tl.where(is_past, offsets, count), axis=0)
    return tl.minimum(first_past, tl.max(tl.where(weights > 0.0, offsets, -1), axis=0))


@triton.jit
def _pick(ptr, count, top, rate, limit, mass, top_k, top_p, uniform, BLOCK: tl.constexpr, PIVOTS: tl.constexpr):
    """Place of the drawn token among `count` logits; none beyond `limit` is kept, and `mass` is what passed min_p."""
    ties = count.to(tl.float32)
    if top_k > 0.0:
        limit, before = _search(ptr, count, top, rate, top_k, limit, False, BLOCK, PIVOTS)
        ties = top_k - before
        mass = _mass(ptr, count, top, rate, limit, ties, BLOCK)
    if top_p < 1.0:
        goal = (top_p * mass.to(tl.float64)).to(tl.float32)
        end, before = _search(ptr, count, top, rate, goal, limit, True, BLOCK, PIVOTS)
        needed = tl.maximum(tl.ceil((goal - before) / _weights(end, rate)), 1.0)
        ties = tl.where(end == limit, tl.minimum(needed, ties), needed)
        limit = end
        mass = _mass(ptr, count, top, rate, limit, ties, BLOCK)
    target = (uniform * mass.to(tl.float64)).to(tl.float32)
    return _invert(ptr, count, top, rate, limit, ties, target, BLOCK)


@triton.jit
def _bound(best, values_ptr, top, rate, floor, total, top_k, top_p, BLOCK: tl.constexpr, PIVOTS: tl.constexpr):
    """A key beyond which no token can be kept, from the lanes' maxima. They are left in `values_ptr`."""
    lanes = tl.arange(0, BLOCK)
    tl.store(values_ptr + lanes, best)
    tl.debug_barrier()
    cut = floor
    if (top_k > 0.0) & (top_k < BLOCK):
        cut, _ = _search(values_ptr, BLOCK, top, rate, top_k, floor, False, BLOCK, PIVOTS)
    elif top_p < 1.0:
        goal = (top_p * total.to(tl.float64)).to(tl.float32)
        cut, _ = _search(values_ptr, BLOCK, top, rate, goal, floor, True, BLOCK, PIVOTS)
    tl.debug_barrier()
    return cut


@triton.jit
def _copy_likeliest(
    row_ptr, values_ptr, ids_ptr, vocab, top, rate, floor, cut, CAPACITY: tl.constexpr, BLOCK: tl.constexpr
):
    """Copies logits up to `cut` and their ids, in the order of ids, as far as there is room.

    Returns how many there are, and the weight of all tokens up to `floor`.
    """
    count = 0
    masses = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, vocab, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        logits = _load_logits(row_ptr, offsets, vocab)
        keys = _key_of(top, logits)
        masses += tl.where(keys <= floor, _weights(keys, rate), 0.0)
        is_in = keys <= cut
        added = tl.sum(is_in.to(tl.int32), axis=0)
        if (added > 0) & (count < CAPACITY):
            places = count - 1 + tl.cumsum(is_in.to(tl.int32), axis=0)
            has_room = is_in & (places < CAPACITY)
            tl.store(values_ptr + places, logits, mask=has_room)
            tl.store(ids_ptr + places, offsets, mask=has_room)
        count += added
    tl.debug_barrier()
    return count, tl.sum(masses, axis=0)


@triton.jit
def _pick_filtered(
    row_ptr,
    values_ptr,
    ids_ptr,
    vocab,
    best,
    top,
    rate,
    floor,
    total,
    top_k,
    top_p,
    uniform,
    CAPACITY: tl.constexpr,
    COPY_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    PIVOTS: tl.constexpr,
):
    cut = _bound(best, values_ptr, top, rate, floor, total, top_k, top_p, BLOCK, PIVOTS)
    count, mass = _copy_likeliest(row_ptr, values_ptr, ids_ptr, vocab, top, rate, floor, cut, CAPACITY, BLOCK)
    if count <= CAPACITY:
        place = _pick(values_ptr, count, top, rate, cut, mass, top_k, top_p, uniform, COPY_BLOCK, PIVOTS)
        token = tl.load(ids_ptr + place)
    else:
        token = _pick(row_ptr, vocab, top, rate, cut, mass, top_k, top_p, uniform, BLOCK, PIVOTS)
    return token


@triton.jit
def sample_kernel(
    logits_ptr,
    temperature_ptr,
    min_p_ptr,
    top_k_ptr,
    top_p_ptr,
    uniform_ptr,
    values_ptr,
    ids_ptr,
    tokens_ptr,
    vocab,
    stride_row,
    CAPACITY: tl.constexpr,
    COPY_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    PIVOTS: tl.constexpr,
):
    """logits [rows, vocab], parameters and tokens [rows]; values and ids [rows, CAPACITY] are scratch."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_row
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    rate = _LOG2_E / tl.where(temperature > 0.0, temperature, 1.0)
    best, top, token, total = _scan_row(row_ptr, vocab, rate, BLOCK)
    if not ((total > 0.0) & (top < float("inf"))):
        token = -1
    elif temperature > 0.0:
        min_p = tl.load(min_p_ptr + row).to(tl.float32)
        top_k = tl.load(top_k_ptr + row).to(tl.float32)
        top_k = tl.where(top_k < vocab, top_k, 0.0)
        top_p = tl.load(top_p_ptr + row).to(tl.float64)
        uniform = tl.load(uniform_ptr + row).to(tl.float64)
        farthest = tl.abs(temperature * tl.log(tl.maximum(min_p, _LEAST_WEIGHT)))
        floor = tl.minimum(farthest.to(tl.int32, bitcast=True), _LAST_KEY)
        if (min_p > 0.0) | (top_k > 0.0) | (top_p < 1.0):
            scratch = row * CAPACITY
            token = _pick_filtered(
                row_ptr, values_ptr + scratch, ids_ptr + scratch, vocab, best, top, rate, floor, total,
                top_k, top_p, uniform, CAPACITY, COPY_BLOCK, BLOCK, PIVOTS,
            )  # fmt: skip
        else:
            target = (uniform * total.to(tl.float64)).to(tl.float32)
            token = _invert(row_ptr, vocab, top, rate, floor, tl.full((), 0.0, tl.float32), target, BLOCK)
    tl.store(tokens_ptr + row, token)


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    min_p: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """One token per row, in one launch that nobody waits for.

    Args:
        logits: [rows, vocab] in float32, float16 or bfloat16; the numbers of a row lie side by side.
        temperature: [rows], any float dtype, like the others. 0 is greedy; else at least 1e-30.
        min_p: 0 is off.
        top_k: whole numbers of any dtype; 0, negative or at least vocab is off.
        top_p: above 0; 1 is off.
        uniform: in [0, 1), what decides the draw.

    Returns:
        int32 [rows]; -1 where a row holds NaN or +inf or nothing but -inf.
    """
    rows, vocab = logits.shape
    assert logits.stride(1) == 1, "a row's logits must lie side by side"
    block = min(BLOCK, triton.next_power_of_2(vocab))
    capacity = max(CAPACITY, block)
    tokens = torch.empty(rows, dtype=torch.int32, device=logits.device)
    values = torch.empty(rows, capacity, dtype=torch.float32, device=logits.device)
    sample_kernel[(rows,)](
        logits,
        temperature,
        min_p,
        top_k,
        top_p,
        uniform,
        values,
        torch.empty_like(values, dtype=torch.int32),
        tokens,
        vocab,
        logits.stride(0),
        CAPACITY=capacity,
        COPY_BLOCK=min(COPY_BLOCK, block),
        BLOCK=block,
        PIVOTS=PIVOTS,
        **sample_options(),
    )
    return tokens


def sample_options() -> dict[str, Any]:
    """Triton's options: two programs to a multiprocessor, as far as registers decide."""
    return launch_options(NUM_WARPS, max_registers=min(MAX_REGISTERS, REGISTERS_PER_SM // (32 * NUM_WARPS)))
