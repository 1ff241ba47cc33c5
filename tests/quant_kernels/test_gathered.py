"""Attention on gathered keys against its specification: batches, chunks, windows, scattered and consecutive blocks."""

from __future__ import annotations

import pytest
import torch

from quant_kernels.attention import reference
from quant_kernels.attention.gathered import make_segments, paged_attention
from quant_kernels.attention.kv_format import LayerCache, plain

BLOCK = 4
#: Room for everything.
ALL = 1000


def random_cache(num_blocks: int, kv_heads: int, head_dim: int) -> LayerCache:
    rng = torch.Generator().manual_seed(7)
    shape = (num_blocks, BLOCK, kv_heads, head_dim)
    return LayerCache(plain(torch.float32), torch.randn(shape, generator=rng), torch.randn(shape, generator=rng))


CASES = {
    "one token, consecutive blocks": [(9, 1, [3, 4, 5])],
    "one token, scattered blocks": [(9, 1, [7, 2, 5])],
    "whole prompt": [(0, 11, [1, 2, 3])],
    "chunk in the middle": [(6, 7, [9, 1, 0, 4])],
    "batch of single tokens": [(0, 1, [2]), (7, 1, [5, 3]), (12, 1, [8, 1, 9, 0])],
    "mixed": [(5, 3, [4, 6]), (3, 1, [0]), (0, 6, [7, 2]), (10, 1, [9, 8, 5])],
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
@pytest.mark.parametrize("max_tokens", [1, 8, ALL])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_matches_the_specification(name: str, window: int | None, heads: int, kv_heads: int, max_tokens: int) -> None:
    entries = CASES[name]
    cache = random_cache(10, kv_heads, 8)
    rows = sum(count for _, count, _ in entries)
    query = torch.randn(rows, heads, 8, generator=torch.Generator().manual_seed(1))
    segments, order = make_segments(entries, BLOCK, max_tokens)
    got = paged_attention(query, cache, segments, 0.3, window)
    row = 0
    for i in order:
        start, count, block_ids = entries[i]
        part = query[row : row + count]
        expected = reference.paged_attention(part, cache.keys, cache.values, block_ids, start, 0.3, window)
        assert torch.allclose(got[row : row + count], expected.flatten(1), rtol=1e-5, atol=1e-5)
        row += count
    assert row == rows == len(got)


def test_consecutive_blocks_are_read_in_place() -> None:
    in_place, _ = make_segments([(9, 1, [3, 4, 5])], BLOCK, ALL)
    gathered, _ = make_segments([(9, 1, [3, 5, 4])], BLOCK, ALL)
    assert in_place[0].block_table is None
    assert gathered[0].block_table is not None


def test_a_long_sequence_does_not_pad_the_short_ones() -> None:
    """One of 8192 tokens among 63 of 10: together they would gather 64 times 8192."""
    long, short = (8191, 1, range(1, 8193, 2)), (9, 1, [0, 2, 4])
    entries = [short, short, long, *[short] * 61]
    segments, order = make_segments(entries, BLOCK, 360)
    assert order[0] == 2
    assert sorted(order) == list(range(64))
    gathered = [0 if s.block_table is None else len(s.block_table) * BLOCK for s in segments]
    assert gathered == [8192, 30 * 12, 30 * 12, 3 * 12]
    assert [(s.first_row, s.num_rows) for s in segments] == [(0, 1), (1, 30), (31, 30), (61, 3)]


def test_unused_slots_do_not_leak() -> None:
    cache = random_cache(6, 2, 8)
    query = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1))
    entries = [(5, 1, [1, 2]), (2, 1, [4])]
    segments, _ = make_segments(entries, BLOCK, ALL)
    before = paged_attention(query, cache, segments, 0.3)
    for poison in (1e4, torch.nan):
        for part in cache.parts():
            part[2, 2:], part[4, 3:], part[0], part[3], part[5] = poison, poison, poison, poison, poison
        segments, _ = make_segments(entries, BLOCK, ALL)
        assert torch.equal(before, paged_attention(query, cache, segments, 0.3))
