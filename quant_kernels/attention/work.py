"""The attention kernel's list of work: which program computes which query tokens over which keys.

A sequence's query tokens are cut into tiles, and a tile's visible keys into shares, so that a long context keeps the
whole card busy. An item is one share of one tile, in int32::

    row        first of the tile's rows in the step
    tokens     query tokens of the tile
    position   of its first query token in the sequence
    table      where the sequence's block ids begin in the flat list
    first, end keys of this share; `first` is a multiple of the kernel's tile of keys
    slot       where the tile's partial results begin
    share, shares    which one this is, of how many; a single share writes the result itself

Invariant: how a tile is cut depends on its own sequence alone, so with one kind of tile a row's result has the same
bits in any company; only when partial results would outgrow their memory is everybody cut less. Works on the host with
numpy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quant_kernels.tuning.attention import MIN_SHARE, AttentionTile

Ints = npt.NDArray[np.int64]
FIELDS = ("row", "tokens", "position", "table", "first", "end", "slot", "share", "shares")
NUM_FIELDS = len(FIELDS)


@dataclass(frozen=True, slots=True)
class Spans:
    """The sequences of a step, each array int64 [num_seqs].

    Attributes:
        rows: each one's first row; its tokens follow.
        starts: position of its first token.
        counts: its tokens.
        tables: where its block ids begin.
    """

    rows: Ints
    starts: Ints
    counts: Ints
    tables: Ints


@dataclass(frozen=True, slots=True)
class Sharing:
    """How far contexts are cut: shares per sequence at most, and slots (query tokens) for partial results in all."""

    most_shares: int
    num_slots: int


def plan_items(spans: Spans, tile: AttentionTile, group: int, window: int | None, sharing: Sharing) -> Ints:
    """The items of a step, int64 [num_items, NUM_FIELDS].

    Args:
        group: query heads per KV head.
        window: a token sees itself and window - 1 tokens before it; None for all.
    """
    tiles = _tiles(spans, tile.block_m // group)
    lowest = np.zeros_like(tiles.position) if window is None else np.maximum(0, tiles.position - window + 1)
    lowest = lowest // tile.keys * tile.keys
    most = sharing.most_shares
    while True:
        length = _share_lengths(tiles, lowest, tile.keys, most)
        shares = -(-(tiles.end - lowest) // length)
        used = np.where(shares > 1, shares * tiles.tokens, 0)
        if used.sum() <= sharing.num_slots:
            return _items(tiles, lowest, length, shares, used)
        most //= 2


@dataclass(frozen=True, slots=True)
class _Tiles:
    row: Ints
    tokens: Ints
    position: Ints
    table: Ints
    per_seq: Ints

    @property
    def end(self) -> Ints:
        return self.position + self.tokens


def _tiles(spans: Spans, tokens_per_tile: int) -> _Tiles:
    num_tiles = -(-spans.counts // tokens_per_tile)
    offset = _counting(num_tiles) * tokens_per_tile
    rows, starts, counts, tables, per_seq = (
        np.repeat(a, num_tiles) for a in (spans.rows, spans.starts, spans.counts, spans.tables, num_tiles)
    )
    return _Tiles(rows + offset, np.minimum(tokens_per_tile, counts - offset), starts + offset, tables, per_seq)


def _share_lengths(tiles: _Tiles, lowest: Ints, keys: int, most: int) -> Ints:
    """Keys per share of each tile, whole turns of the loop."""
    visible = tiles.end - lowest
    shares = np.clip(most // tiles.per_seq, 1, np.maximum(1, -(-visible // MIN_SHARE)))
    length: Ints = np.maximum(1, -(-visible // (shares * keys))) * keys
    return length


def _items(tiles: _Tiles, lowest: Ints, length: Ints, shares: Ints, used: Ints) -> Ints:
    share = _counting(shares)
    slot = np.cumsum(used) - used
    columns = (tiles.row, tiles.tokens, tiles.position, tiles.table, lowest, tiles.end, slot, length, shares)
    row, tokens, position, table, low, end, slot, length, shares = (np.repeat(c, shares) for c in columns)
    first = low + share * length
    fields = (row, tokens, position, table, first, np.minimum(first + length, end), slot, share, shares)
    return np.stack(fields, axis=1)


def _counting(lengths: Ints) -> Ints:
    """0 .. n - 1 for each n, one after the other."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
