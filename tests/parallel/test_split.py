"""Splitting a model: whatever the sizes, the parts of all ranks add up to the whole, and cuts fall where they may."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qengine.config import ModelConfig, RopeConfig
from qengine.errors import ConfigError
from qengine.parallel.split import TPSplit, regrouped, share_out, split_model, stage_layers


def model(
    heads: tuple[int, int] = (32, 8), intermediate: int = 14336, vocab: int = 128256, head_dim: int = 128
) -> ModelConfig:
    num_heads, num_kv_heads = heads
    return ModelConfig(
        architecture="llama",
        vocab_size=vocab,
        hidden_size=num_heads * head_dim,
        intermediate_size=intermediate,
        num_layers=4,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position=64,
        rms_norm_eps=1e-6,
        rope=RopeConfig(),
        tie_word_embeddings=False,
    )


def sizes(split: TPSplit, name: str) -> list[int]:
    return [len(getattr(shape, name)) for shape in split.ranks]


@pytest.mark.parametrize(
    ("intermediate", "num_ranks", "groups"),
    [
        (29568, 2, [116, 115]),  # Qwen2.5-72B
        (29568, 4, [58, 58, 58, 57]),
        (13696, 2, [54, 53]),
        (13696, 3, [36, 36, 35]),
        (28672, 2, [112, 112]),  # Llama-3-70B
        (11008, 4, [22, 22, 21, 21]),  # Llama-2-7B
    ],
)
def test_groups_of_down_are_never_cut(intermediate: int, num_ranks: int, groups: list[int]) -> None:
    split = split_model(model(intermediate=intermediate), num_ranks, down_groups={128})
    assert sizes(split, "intermediate") == [128 * count for count in groups]


@pytest.mark.parametrize(
    ("heads", "num_ranks", "query", "kv"),
    [
        ((64, 8), 2, [(0, 32), (32, 64)], [(0, 4), (4, 8)]),
        ((32, 8), 3, [(0, 12), (12, 24), (24, 32)], [(0, 3), (3, 6), (6, 8)]),
        ((14, 2), 2, [(0, 7), (7, 14)], [(0, 1), (1, 2)]),
        ((14, 2), 3, [(0, 4), (4, 7), (7, 14)], [(0, 1), (0, 1), (1, 2)]),
        ((14, 2), 4, [(0, 4), (4, 7), (7, 11), (11, 14)], [(0, 1), (0, 1), (1, 2), (1, 2)]),
        ((4, 4), 3, [(0, 2), (2, 3), (3, 4)], [(0, 2), (2, 3), (3, 4)]),
        ((6, 1), 4, [(0, 2), (2, 4), (4, 5), (5, 6)], [(0, 1)] * 4),
        ((14, 2), 1, [(0, 14)], [(0, 2)]),
    ],
)
def test_heads(heads: tuple[int, int], num_ranks: int, query: list[tuple[int, int]], kv: list[tuple[int, int]]) -> None:
    split = split_model(model(heads), num_ranks)
    assert [(s.query_heads.start, s.query_heads.stop) for s in split.ranks] == query
    assert [(s.kv_heads.start, s.kv_heads.stop) for s in split.ranks] == kv


def test_unlike_cards_get_shares_in_proportion() -> None:
    split = split_model(model((64, 8), 28672), 2, down_groups={128}, weights=[22, 10])
    assert sizes(split, "intermediate") == [154 * 128, 70 * 128]
    assert sizes(split, "kv_heads") == [6, 2]
    assert sizes(split, "query_heads") == [48, 16]
    assert split.vocab_sizes == (689 * 128, 313 * 128)


def test_a_rank_has_the_config_of_a_smaller_model() -> None:
    config = model((14, 2), 4864)
    local = split_model(config, 4, down_groups={64}).ranks[1].local(config)
    assert (local.num_heads, local.num_kv_heads, local.intermediate_size) == (3, 1, 10 * 128)
    assert (local.hidden_size, local.head_dim, local.vocab_size) == (14 * 128, 128, 128256)


def test_vocabulary_is_cut_at_tiles_and_ends_anywhere() -> None:
    assert split_model(model(vocab=128258), 2).vocab_sizes == (502 * 128, 128258 - 502 * 128)
    assert split_model(model(vocab=97), 2).vocab_sizes == (64, 33)
    assert split_model(model(vocab=3), 3).vocab_sizes == (1, 1, 1)


@given(
    heads=st.tuples(st.integers(1, 12), st.integers(1, 12)).map(lambda t: (t[0] * t[1], t[1])),
    intermediate=st.integers(1, 4000).map(lambda n: 8 * n),
    vocab=st.integers(1, 5000),
    num_ranks=st.integers(1, 9),
    groups=st.sets(st.sampled_from([None, -1, 32, 64, 128]), max_size=3),
    data=st.data(),
)
def test_parts_add_up(
    heads: tuple[int, int],
    intermediate: int,
    vocab: int,
    num_ranks: int,
    groups: set[int | None],
    data: st.DataObject,
) -> None:
    weights = data.draw(st.none() | st.lists(st.floats(0.5, 90), min_size=num_ranks, max_size=num_ranks))
    config = model(heads, intermediate, vocab, head_dim=8)
    try:
        split = split_model(config, num_ranks, down_groups=groups, weights=weights)
    except ConfigError:
        cut = math.lcm(*(g for g in groups if g is not None and 0 < g < intermediate), 8)
        assert num_ranks > min(heads[0], vocab, -(-intermediate // cut))
        return
    assert split == split_model(config, num_ranks, down_groups=groups, weights=weights)
    for name, total in (("query_heads", heads[0]), ("intermediate", intermediate), ("vocab", vocab)):
        parts = [getattr(shape, name) for shape in split.ranks]
        assert [i for part in parts for i in part] == list(range(total)), name
        assert all(part.step == 1 and len(part) for part in parts), name
    for shape in split.ranks:
        for group in groups - {None, -1}:
            assert shape.intermediate.start % (group or 1) == 0 or intermediate <= (group or 1)


@given(ratio=st.integers(1, 12), num_kv_heads=st.integers(1, 12), num_ranks=st.integers(1, 24))
def test_a_rank_has_the_kv_heads_it_uses_at_one_ratio(ratio: int, num_kv_heads: int, num_ranks: int) -> None:
    if num_ranks > ratio * num_kv_heads:
        return
    split = split_model(model((ratio * num_kv_heads, num_kv_heads), head_dim=2), num_ranks)
    for shape in split.ranks:
        used = [head // ratio for head in shape.query_heads]
        assert sorted(set(used)) == list(shape.kv_heads)
        assert len({used.count(head) for head in shape.kv_heads}) == 1
    most = max(len(shape.kv_heads) for shape in split.ranks)
    assert most == max(1, -(-num_kv_heads // num_ranks)), "as few kv heads as possible"


@given(
    extra=st.integers(0, 60),
    weights=st.lists(st.integers(1, 40), min_size=1, max_size=4),
)
def test_no_other_shares_have_a_lower_peak(extra: int, weights: list[int]) -> None:
    total = len(weights) + extra
    shares = share_out(total, weights)
    assert sum(shares) == total
    assert min(shares) >= 1
    peak = max(n / w for n, w in zip(shares, weights, strict=True))
    # With a lower peak every rank takes less than peak * weight, or its minimum of one: not enough in all.
    fewer = [max(1, math.ceil(peak * w - 1e-9) - 1) for w in weights]
    assert sum(fewer) < total or peak == max(1 / w for w in weights)


@given(num_layers=st.integers(1, 100), num_stages=st.integers(1, 10))
def test_stages_take_neighbouring_layers(num_layers: int, num_stages: int) -> None:
    if num_layers < num_stages:
        with pytest.raises(ConfigError, match=f"has {num_layers} layers.*use at most {num_layers}"):
            stage_layers(num_layers, num_stages)
        return
    stages = stage_layers(num_layers, num_stages)
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))
    assert max(map(len, stages)) - min(map(len, stages)) <= 1
    assert all(len(a) >= len(b) for a, b in pairwise(stages))


def test_stages_of_unlike_cards() -> None:
    assert stage_layers(80, 2, [24, 12]) == (range(54), range(54, 80))


@pytest.mark.parametrize(
    ("group", "first", "expected"), [(128, 448, 64), (128, 0, 128), (128, 4096, 128), (128, 96, 32), (64, 80, 16)]
)
def test_cut_groups_become_smaller_ones(group: int, first: int, expected: int) -> None:
    assert regrouped(group, first) == expected


@pytest.mark.parametrize(
    ("heads", "intermediate", "num_ranks", "message"),
    [
        ((4, 2), 1024, 8, "the model has 4 query heads, and a rank needs at least one; use at most 4"),
        ((16, 2), 256, 3, "down_proj has 2 groups of 128 inputs to hand out, .*; use at most 2, or a smaller group"),
        ((14, 3), 1024, 2, "14 query heads are no multiple of its 3 kv heads"),
        ((14, 2), 1024, 0, "tensor_parallel_size is 0, expected at least 1"),
    ],
)
def test_what_cannot_be_split_is_refused(
    heads: tuple[int, int], intermediate: int, num_ranks: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        split_model(model(heads, intermediate), num_ranks, down_groups={128})


def test_a_vocabulary_smaller_than_the_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match=re.escape("the vocabulary has 3 entries; use at most 3")):
        split_model(model(vocab=3), 4)


@pytest.mark.parametrize(
    ("weights", "message"), [([22.0], "1 sizes of cards are given"), ([22.0, 0.0], "finite numbers above zero")]
)
def test_bad_sizes_of_cards_are_refused(weights: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split_model(model(), 2, weights=weights)
    with pytest.raises(ConfigError, match=message):
        stage_layers(10, 2, weights)
