"""Paged attention in plain torch, on gathered keys and values: the CPU path.

Sequences with one query token form padded batches of like lengths and bounded size; longer ones (prompt chunks, drafts)
run one by one. Keys and values live in blocks; a lone sequence whose blocks are consecutive is read in place, others
are gathered::

    slot of position p = block_ids[p // block_size] * block_size + p % block_size

Quantized caches are expanded as they are gathered. Invariant: positions beyond a sequence's context are never attended
to, whatever the block holds.
It does not schedule and does not know requests: a `Segment` is all it sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from quant_kernels.attention.kv_format import LayerCache, read


@dataclass(slots=True)
class Segment:
    """Rows [first_row, first_row + num_rows) of a step that share one attention call.

    Either `num_seqs` sequences of one query token each, or one sequence of `num_rows` query tokens.

    Attributes:
        starts: position of each sequence's first query token.
        block_table: int64 [num_seqs * blocks], padded with each sequence's first block; None when read in place.
        unused: int64 rows of the gathered copy beyond each sequence's context; None if there are none.
        first_block: the first of consecutive blocks when read in place.
        context_len: keys that are read per sequence (padded to the longest).
    """

    first_row: int
    num_rows: int
    num_seqs: int
    starts: tuple[int, ...]
    context_len: int
    block_table: torch.Tensor | None
    first_block: int = 0
    unused: torch.Tensor | None = None
    masks: dict[int | None, torch.Tensor | None] = field(default_factory=dict)

    def mask(self, window: int | None) -> torch.Tensor | None:
        """Boolean mask [num_seqs, 1, queries, context_len], True where attended; None if all is. Cached per step."""
        if window is not None and window >= self.context_len:
            window = None
        if window not in self.masks:
            self.masks[window] = self._make_mask(window)
        return self.masks[window]

    def _make_mask(self, window: int | None) -> torch.Tensor | None:
        num_queries = self.num_rows // self.num_seqs
        first = torch.tensor(self.starts)
        last = (first.unsqueeze(1) + torch.arange(num_queries)).view(self.num_seqs, 1, num_queries, 1)
        positions = torch.arange(self.context_len)
        mask = positions <= last
        if window is not None:
            mask &= positions > last - window
        return None if bool(mask.all()) else mask


def make_segments(
    entries: Sequence[tuple[int, int, Sequence[int]]], block_size: int, max_tokens: int
) -> tuple[list[Segment], list[int]]:
    """Group the sequences of a step.

    Args:
        entries: (start, num_tokens, block_ids) per sequence.
        max_tokens: what sequences of one query token may gather together, padding included; a longer one is alone.

    Returns:
        The segments, and the order in which the entries' tokens must be laid out as rows.
    """
    singles = [i for i, (_, count, _) in enumerate(entries) if count == 1]
    others = [i for i, (_, count, _) in enumerate(entries) if count != 1]
    slices = _slices(singles, [start + count for start, count, _ in entries], block_size, max_tokens)
    segments, order = [], []
    row = 0
    for members in [*slices, *([i] for i in others)]:
        segments.append(_segment([entries[i] for i in members], row, block_size))
        row += segments[-1].num_rows
        order += members
    return segments, order


def _slices(singles: Sequence[int], lengths: Sequence[int], block_size: int, max_tokens: int) -> list[list[int]]:
    """Sequences from the longest to the shortest, cut so that no slice, padded to its first, exceeds `max_tokens`."""
    slices: list[list[int]] = []
    room = 0
    for i in sorted(singles, key=lambda i: -lengths[i]):
        if not room:
            slices.append([])
            room = max(1, max_tokens // (-(-lengths[i] // block_size) * block_size))
        slices[-1].append(i)
        room -= 1
    return slices


def _segment(entries: list[tuple[int, int, Sequence[int]]], row: int, block_size: int) -> Segment:
    context_len = max(start + count for start, count, _ in entries)
    starts = tuple(start for start, _, _ in entries)
    rows = sum(count for _, count, _ in entries)
    num_blocks = -(-context_len // block_size)
    first_block = entries[0][2][0]
    if len(entries) == 1 and _consecutive(entries[0][2][:num_blocks]):
        return Segment(row, rows, 1, starts, context_len, None, first_block)
    tables = [list(block_ids[:num_blocks]) for _, _, block_ids in entries]
    padded = [table + table[:1] * (num_blocks - len(table)) for table in tables]
    capacity = num_blocks * block_size
    unused = [
        i * capacity + position
        for i, (start, count, _) in enumerate(entries)
        for position in range(start + count, capacity)
    ]
    return Segment(
        row,
        rows,
        len(entries),
        starts,
        context_len,
        torch.tensor(padded).view(-1),
        unused=torch.tensor(unused) if unused else None,
    )


def _consecutive(block_ids: Sequence[int]) -> bool:
    return block_ids[-1] - block_ids[0] + 1 == len(block_ids) and all(
        b == block_ids[0] + i for i, b in enumerate(block_ids)
    )


def _read(cache: LayerCache, segment: Segment, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values as [num_seqs, num_kv_heads, context_len, head_dim]; views of a plain cache when read in place."""
    if segment.block_table is None:
        num_blocks = -(-segment.context_len // cache.block_size)
        blocks: torch.Tensor | slice = slice(segment.first_block, segment.first_block + num_blocks)
    else:
        blocks = segment.block_table
    keys, values = read(cache, blocks, dtype)
    return _by_head(keys, segment), _by_head(values, segment)


def _by_head(gathered: torch.Tensor, segment: Segment) -> torch.Tensor:
    num_heads, head_dim = gathered.shape[2:]
    # A plain cache is; what was decoded of short blocks of bytes need not be.
    gathered = gathered.contiguous()
    if segment.unused is not None:
        # A masked key still counts if it is NaN, and nobody vouches for what a reused block holds.
        gathered.view(-1, num_heads, head_dim).index_fill_(0, segment.unused, 0)
    flat = gathered.view(segment.num_seqs, -1, num_heads, head_dim)[:, : segment.context_len]
    return flat.transpose(1, 2)


def paged_attention(
    query: torch.Tensor, cache: LayerCache, segments: Sequence[Segment], scale: float, window: int | None = None
) -> torch.Tensor:
    """Attention of all rows of a step; keys and values of this step are already in the cache.

    Args:
        query: [rows, num_heads, head_dim], laid out in the order `make_segments` gave.

    Returns:
        [rows, num_heads * head_dim] in the cache's dtype, or in float32 if the cache is quantized.
    """
    parts = [_attend(query, cache, segment, scale, window) for segment in segments]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend(query: torch.Tensor, cache: LayerCache, segment: Segment, scale: float, window: int | None) -> torch.Tensor:
    rows = query[segment.first_row : segment.first_row + segment.num_rows]
    num_rows, num_heads, head_dim = rows.shape
    # Bytes times their scale need more bits than bfloat16 has; torch's float32 attention is no slower on a CPU.
    rows = rows.to(cache.format.dtype or torch.float32)
    keys, values = _read(cache, segment, rows.dtype)
    num_kv_heads = keys.shape[1]
    mask = segment.mask(window)
    if segment.num_seqs == num_rows:
        # One query per sequence: the heads of a KV group stand in for query rows, so nothing is repeated.
        q = rows.view(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale)
        return out.reshape(num_rows, num_heads * head_dim)
    q = rows.transpose(0, 1).unsqueeze(0)
    whole_prompt = segment.starts[0] == 0 and (window is None or window >= segment.context_len)
    out = F.scaled_dot_product_attention(
        q,
        keys,
        values,
        attn_mask=None if whole_prompt else mask,
        is_causal=whole_prompt,
        scale=scale,
        enable_gqa=num_heads != num_kv_heads,
    )
    return out.squeeze(0).transpose(0, 1).reshape(num_rows, num_heads * head_dim)
