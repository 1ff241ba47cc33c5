"""Attention's work list: every visible key of every query token is in exactly one item, whatever the cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quant_kernels.attention.work import FIELDS, Ints, Sharing, Spans, plan_items
from quant_kernels.tuning.attention import (
    AttentionTile,
    attention_tiles,
    max_group,
    most_shares,
    select_attention,
)
from quant_kernels.tuning.card import KNOWN_CARDS

TILE = AttentionTile(16, 64, 4, 2)
SHARING = Sharing(8, 1000)


def items(
    entries: Sequence[tuple[int, int]],
    group: int = 4,
    window: int | None = None,
    sharing: Sharing = SHARING,
    tile: AttentionTile = TILE,
) -> list[dict[str, int]]:
    starts, counts = (np.array(a, dtype=np.int64) for a in zip(*entries, strict=True))
    rows = np.cumsum(counts) - counts
    table: Ints = np.arange(len(entries), dtype=np.int64) * 1000
    found = plan_items(Spans(rows, starts, counts, table), tile, group, window, sharing)
    return [dict(zip(FIELDS, map(int, item), strict=True)) for item in found]


sequences = st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 70)), min_size=1, max_size=6)


@given(sequences, st.sampled_from([1, 3, 7, 16]), st.sampled_from([None, 1, 100, 5000]), st.integers(1, 70))
def test_every_visible_key_once(entries: list[tuple[int, int]], group: int, window: int | None, shares: int) -> None:
    found = items(entries, group, window, Sharing(shares, 200))
    seen: Counter[int] = Counter()
    slots: set[int] = set()
    for item in found:
        assert item["first"] % TILE.keys == 0
        assert item["first"] < item["end"] <= item["position"] + item["tokens"]
        assert item["tokens"] * group <= TILE.block_m
        lowest = 0 if window is None else max(0, item["position"] - window + 1)
        if item["share"] == 0:
            assert item["first"] <= lowest < item["first"] + TILE.keys
            seen.update(range(item["row"], item["row"] + item["tokens"]))
        if item["share"] == item["shares"] - 1:
            assert item["end"] == item["position"] + item["tokens"]
        if item["shares"] > 1:
            mine = range(
                item["slot"] + item["share"] * item["tokens"], item["slot"] + (item["share"] + 1) * item["tokens"]
            )
            assert slots.isdisjoint(mine)
            slots.update(mine)
    assert seen == Counter(range(sum(count for _, count in entries)))
    assert len(slots) <= 200
    assert all(slot < 200 for slot in slots)
    _check_shares_meet(found)


def _check_shares_meet(found: list[dict[str, int]]) -> None:
    for before, after in pairwise(found):
        if after["share"]:
            assert after["first"] == before["end"]
            assert after["share"] == before["share"] + 1


def test_a_sequence_is_cut_the_same_in_any_company() -> None:
    alone = items([(2000, 1)])
    for company in ([(2000, 1), (5, 1)], [(2000, 1), (900, 1), (3000, 1)]):
        assert [(i["first"], i["end"]) for i in items(company) if i["row"] == 0] == [
            (i["first"], i["end"]) for i in alone
        ]


def test_little_room_means_fewer_shares() -> None:
    many = items([(3000, 1)] * 8, sharing=Sharing(8, 1000))
    few = items([(3000, 1)] * 8, sharing=Sharing(8, 16))
    none = items([(3000, 1)] * 8, sharing=Sharing(8, 3))
    assert (len(many), len(few), len(none)) == (64, 16, 8)
    assert {i["shares"] for i in none} == {1}


def test_short_contexts_are_not_cut() -> None:
    assert len(items([(100, 1), (0, 1)])) == 2
    assert len(items([(500, 1)])) > 1


@pytest.mark.parametrize("name", KNOWN_CARDS)
def test_tiles_by_what_a_sequence_has_to_do(name: str) -> None:
    card = KNOWN_CARDS[name]
    for head_dim in (64, 80, 128, 256):
        decode = select_attention(card, head_dim, 4, 1, packed=False)
        assert decode.block_m == 16
        assert select_attention(card, head_dim, 4, 4, packed=False) == decode
        chunk = select_attention(card, head_dim, 4, 500, packed=False)
        assert chunk == attention_tiles(card.arch, head_dim, packed=False)[-1]
        most = max_group(card.arch, head_dim)
        assert select_attention(card, head_dim, most, 1, packed=False).block_m == most
    assert most_shares(card, 8) * 8 >= card.num_sms
    assert most_shares(card, 1024) == 1
