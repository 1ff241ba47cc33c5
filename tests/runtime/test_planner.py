"""The memory plan: what fits, what does not, and that every byte is given to someone."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qengine.config import CacheConfig, EngineConfig, ModelConfig, RopeConfig
from qengine.errors import ConfigError, DoesNotFitError
from qengine.runtime.machine_memory import available_memory, driver_cards
from qengine.runtime.model_bytes import MergedFacts, ModelFacts
from qengine.runtime.planner import (
    Card,
    Loaded,
    Machine,
    MemoryPlan,
    allowed_bytes,
    batched_tokens,
    check_gpu,
    compute_dtype,
    make_plan,
)
from qengine.runtime.planning import plan_to_start
from quant_kernels.footprint import WeightFacts

GIB = 2**30
# Llama-3-8B: 2 (keys, values) * 32 layers * 8 heads * 128 = 65,536 numbers a token, 131,072 bytes in bfloat16.
LLAMA_3_8B = ModelConfig("llama", 128256, 4096, 14336, 32, 32, 8, 128, 8192, 1e-5, RopeConfig(), False)
TOKEN_BYTES = 131_072


def packed(rows: int, columns: int) -> WeightFacts:
    return WeightFacts(rows, columns, bits=4, group_size=128, zero_const=8)


def facts(config: ModelConfig) -> ModelFacts:
    """The model in 4 bits, groups of 128, with a plain head."""
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_layers
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears = (
        MergedFacts("qkv", (packed(hidden, q), packed(hidden, kv), packed(hidden, kv)), layers),
        MergedFacts("o", (packed(q, hidden),), layers),
        MergedFacts("gate_up", (packed(hidden, inner), packed(hidden, inner)), layers),
        MergedFacts("down", (packed(inner, hidden),), layers),
        MergedFacts("head", (WeightFacts(hidden, config.vocab_size),), 1),
    )
    return ModelFacts("model", config, config.tie_word_embeddings, linears, "GPTQ 4-bit", "gptq", 4, 128)


#: The same cache per token with next to no weights, for questions of the cache alone.
CACHE_ONLY = replace(facts(replace(LLAMA_3_8B, vocab_size=256)), linears=())


def on_cpu(free_bytes: int, model: ModelFacts = CACHE_ONLY, **options: object) -> MemoryPlan:
    machine = Machine("cpu", (Card("cpu", free_bytes),), "bfloat16", has_graphs=False)
    return plan_to_start(model, EngineConfig.from_options(options), machine)


def gpu(*sizes: float) -> Machine:
    return Machine("gpu", tuple(Card(f"{size:g} GiB card", int(size * GIB)) for size in sizes), "float16")


def on_gpu(*sizes: float, model: ModelFacts | None = None, **options: object) -> MemoryPlan:
    return make_plan(model or facts(LLAMA_3_8B), EngineConfig.from_options(options), gpu(*sizes))


# On a CPU


def test_plenty_of_memory_holds_four_full_sequences() -> None:
    result = on_cpu(64 * GIB)
    assert (result.max_model_len, result.kv_bytes_per_token) == (8192, TOKEN_BYTES)
    assert result.num_blocks == 4 * 8192 // 16
    assert result.kv_cache_bytes == 4 * 8192 * TOKEN_BYTES
    assert result.max_concurrency == 4


def test_never_more_than_a_quarter_of_free_memory() -> None:
    result = on_cpu(8 * GIB)
    assert result.kv_cache_bytes <= 2 * GIB
    assert result.max_model_len == 8192


def test_the_models_own_length_is_lowered_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        result = on_cpu(2 * GIB)
    assert result.max_model_len == 4096 == result.num_blocks * 16
    assert result.is_lowered
    assert [r.getMessage() for r in caplog.records if "8192 to 4096" in r.getMessage()]
    assert len(caplog.records) == 1


def test_an_explicit_length_that_does_not_fit_names_the_one_that_does() -> None:
    with pytest.raises(DoesNotFitError, match="use max_model_len 4096 or less") as caught:
        on_cpu(2 * GIB, max_model_len=8192)
    assert "KV cache" in caught.value.table
    assert caught.value.table in str(caught.value)
    assert on_cpu(2 * GIB, max_model_len=4096).max_model_len == 4096


def test_longer_than_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="at most 8192 positions"):
        on_cpu(64 * GIB, max_model_len=8193)


def test_an_absolute_size_overrides_the_share() -> None:
    result = on_cpu(2 * GIB, kv_cache_memory_bytes="1GiB")
    assert result.kv_cache_bytes == GIB
    with pytest.raises(DoesNotFitError, match="kv_cache_memory_bytes"):
        on_cpu(64 * GIB, kv_cache_memory_bytes=2**20)
    with pytest.raises(DoesNotFitError, match="kv_cache_memory_bytes") as caught:
        on_cpu(2 * GIB, kv_cache_memory_bytes="1000GiB")
    assert "no --kv-cache-memory-bytes: fits a context of 4096 tokens" in caught.value.table


def test_auto_is_the_largest_that_fits(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert on_cpu(2 * GIB, max_model_len="auto").max_model_len == 4096
    assert not caplog.records


def test_weights_beyond_memory_are_refused_on_a_cpu() -> None:
    # 8B in 4 bits and two plain tables of 128256 x 4096 take over 5 GiB.
    with pytest.raises(DoesNotFitError, match="does not fit cpu"):
        on_cpu(5 * GIB, facts(LLAMA_3_8B))
    assert on_cpu(12 * GIB, facts(LLAMA_3_8B)).max_model_len == 8192


def test_this_machine_has_memory() -> None:
    assert available_memory() > 2**26
    assert all(card.total_bytes > GIB for card in driver_cards())


# On cards


def test_weights_by_hand() -> None:
    [card] = on_gpu(24).cards

    # Codes: 4 bits. Tables: a scale of 2 bytes for each group of 128 inputs, and a row of zeros at the end.
    def linear(rows: int, columns: int) -> int:
        return rows * columns // 2 + 2 * (rows // 128 + 1) * columns

    layer = linear(4096, 6144) + linear(4096, 4096) + linear(4096, 28672) + linear(14336, 4096)
    norms = 65 * 4096 * 2
    assert card.weight_bytes == 32 * layer + norms + 2 * 128256 * 4096 * 2
    assert card.kv_bytes_per_token == TOKEN_BYTES


def test_every_byte_is_given_to_someone() -> None:
    [card] = on_gpu(24).cards
    parts = (card.weight_bytes, card.step_buffer_bytes, card.graph_bytes, card.reserve_bytes, card.kv_bytes)
    assert sum(parts) + card.free_bytes == card.total_bytes == 24 * GIB
    assert min(parts) > 0
    assert 0 <= card.free_bytes < 16 * TOKEN_BYTES
    assert card.reserve_bytes > 24 * GIB * 0.08


def test_what_takes_more_leaves_less() -> None:
    usual = on_gpu(24)
    assert on_gpu(24, max_num_batched_tokens=8192).num_blocks < usual.num_blocks
    assert on_gpu(24, max_num_seqs=16).num_blocks > usual.num_blocks
    assert on_gpu(24, gpu_memory_utilization=0.97).num_blocks > usual.num_blocks
    assert on_gpu(24, gpu_memory_limit="12GiB").num_blocks < usual.num_blocks
    eager = make_plan(facts(LLAMA_3_8B), EngineConfig(), replace(gpu(24), has_graphs=False))
    assert eager.cards[0].graph_bytes == 0
    assert eager.num_blocks > usual.num_blocks


def test_half_the_bytes_are_twice_the_tokens() -> None:
    half = on_gpu(24)
    for name, per_token in (("fp8_e5m2", 2**16), ("int8", 2**16 * 130 // 128), ("fp8", 2**16 * 130 // 128)):
        found = on_gpu(24, kv_cache_dtype=name)
        assert found.kv_bytes_per_token == per_token
        assert found.num_blocks == pytest.approx(half.num_blocks * TOKEN_BYTES / per_token, abs=2)


def test_a_share_or_a_limit_and_never_more_than_is_free() -> None:
    card = Card("card", 24 * GIB)
    assert allowed_bytes(card, EngineConfig(), 0) == int(24 * GIB * 0.92)
    limited = EngineConfig(cache=CacheConfig(gpu_memory_limit=20 * GIB))
    assert allowed_bytes(card, limited, 0) == 20 * GIB
    assert allowed_bytes(replace(card, free_bytes=12 * GIB), limited, 0) == 12 * GIB
    with pytest.raises(ConfigError, match=r"gpu_memory_limit is 30.00 GiB, but card has 24.00 GiB; lower it"):
        allowed_bytes(card, EngineConfig(cache=CacheConfig(gpu_memory_limit=30 * GIB)), 0)


def test_limits_per_card() -> None:
    found = on_gpu(24, 24, gpu_memory_limit="22,10")
    assert [c.reserve_bytes // GIB for c in found.cards] == [2, 14]
    assert found.cards[0].weight_bytes > found.cards[1].weight_bytes
    with pytest.raises(ConfigError, match=r"gpu_memory_limit has 2 sizes for 1 card"):
        on_gpu(24, gpu_memory_limit="22,10")


def test_large_cards_take_large_steps() -> None:
    assert batched_tokens(EngineConfig(), gpu(24)) == 2048
    assert batched_tokens(EngineConfig(), gpu(79.1)) == 8192
    assert batched_tokens(EngineConfig.from_options({"max_num_batched_tokens": 100}), gpu(79.1)) == 100


def test_a_card_that_is_too_small() -> None:
    found = on_gpu(4)
    assert (found.fits, found.max_model_len, found.num_blocks, found.max_concurrency) == (False, 0, 0, 0)
    assert found.cards[0].free_bytes < 0
    with pytest.raises(DoesNotFitError, match=r"model does not fit 4 GiB card: .* are missing"):
        plan_to_start(facts(LLAMA_3_8B), EngineConfig(), gpu(4))


def test_weights_that_are_measured_take_the_place_of_planned_ones() -> None:
    found = make_plan(facts(LLAMA_3_8B), EngineConfig(), gpu(24), loaded=Loaded((7 * GIB,)))
    assert found.cards[0].weight_bytes == 7 * GIB


def test_less_that_is_free_is_used_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    [card] = gpu(24).cards
    for free, options in ((23, {}), (24, {"gpu_memory_limit": 24})):
        roomy = replace(gpu(24), cards=(replace(card, free_bytes=free * GIB),))
        plan_to_start(facts(LLAMA_3_8B), EngineConfig.from_options(options), roomy)
    assert "is free" not in caplog.text
    short = replace(gpu(24), cards=(replace(card, free_bytes=20 * GIB),))
    plan = plan_to_start(facts(LLAMA_3_8B), EngineConfig(), short)
    assert "24 GiB card) has 20.00 GiB free, less than the 22.08 GiB that gpu_memory_utilization allows" in caplog.text
    assert plan.cards[0].reserve_bytes > 4 * GIB
    caplog.clear()
    plan_to_start(facts(LLAMA_3_8B), EngineConfig.from_options({"gpu_memory_limit": 22}), short)
    assert "less than the 22.00 GiB that gpu_memory_limit allows" in caplog.text


# Several cards


def test_two_cards_share() -> None:
    one, two = on_gpu(24), on_gpu(24, 24)
    assert len(two.cards) == 2
    assert two.cards[0] == two.cards[1]
    # Norms are on both, and so is the row of zeros after the scales of o and down, whose inputs are halved.
    both = 65 * 4096 * 2 + 32 * 2 * 4096 * 2
    assert sum(c.weight_bytes for c in two.cards) == one.cards[0].weight_bytes + both
    assert two.cards[0].kv_bytes_per_token == TOKEN_BYTES // 2
    assert two.num_blocks > 2 * one.num_blocks


def test_kv_heads_that_are_copied_are_counted() -> None:
    config = replace(LLAMA_3_8B, num_kv_heads=2)
    found = make_plan(facts(config), EngineConfig(), gpu(*[24] * 4))
    # Four ranks, two kv heads: each rank caches one.
    assert [c.kv_bytes_per_token for c in found.cards] == [2 * 32 * 128 * 2] * 4


def test_unlike_cards_balance() -> None:
    found = on_gpu(24, 12)
    assert found.cards[0].weight_bytes > found.cards[1].weight_bytes
    even = [found.cards[i].num_blocks for i in (0, 1)]
    assert even[0] == even[1] == found.num_blocks
    # An even split would leave the smaller card alone with half of everything.
    assert found.num_blocks > on_gpu(12, 12).num_blocks
    assert all(c.free_bytes >= 0 for c in found.cards)


# Properties

_LENGTHS = st.integers(1, 8192)
_MACHINES = st.sampled_from([gpu(6), gpu(8), gpu(9.5), gpu(24), gpu(5, 5), gpu(24, 4)])


def planned(machine: Machine, length: int | str | None) -> MemoryPlan:
    return make_plan(facts(LLAMA_3_8B), EngineConfig.from_options({"max_model_len": length}), machine)


@settings(deadline=None, max_examples=50)
@given(_MACHINES, _LENGTHS, _LENGTHS)
def test_feasible_lengths_are_monotonic(machine: Machine, a: int, b: int) -> None:
    shorter, longer = sorted((a, b))
    assert planned(machine, shorter).fits or not planned(machine, longer).fits


@settings(deadline=None, max_examples=50)
@given(_MACHINES, _LENGTHS)
def test_the_longest_is_exact(machine: Machine, length: int) -> None:
    found = planned(machine, length)
    if found.fits:
        assert found.max_model_len == length <= found.longest_len
        return
    longest = found.max_model_len
    assert longest < length
    assert longest == 0 or planned(machine, longest).fits
    assert not planned(machine, longest + 1).fits


@settings(deadline=None, max_examples=50)
@given(_MACHINES, st.sampled_from([None, "auto", 1, 4000, 8192]), st.sampled_from(["auto", "int8", "fp8_e5m2"]))
def test_columns_add_up(machine: Machine, length: int | str | None, kv_dtype: str) -> None:
    config = EngineConfig.from_options({"max_model_len": length, "kv_cache_dtype": kv_dtype})
    found = make_plan(facts(LLAMA_3_8B), config, machine)
    for card in found.cards:
        parts = (card.weight_bytes, card.step_buffer_bytes, card.graph_bytes, card.reserve_bytes, card.kv_bytes)
        assert sum(parts) + card.free_bytes == card.total_bytes
        assert card.free_bytes >= 0 or not found.fits
        assert card.num_blocks == found.num_blocks
    is_whole = found.max_model_len == found.wanted_len
    assert found.fits == (found.max_model_len > 0 and (is_whole or not isinstance(length, int)))


# What the kernels know


def test_dtypes() -> None:
    assert compute_dtype("auto", "float16", on_gpu=False) == "bfloat16"
    assert compute_dtype("auto", "bfloat16", on_gpu=True) == "bfloat16"
    assert {compute_dtype("auto", stored, on_gpu=True) for stored in ("float16", "float32", None)} == {"float16"}
    with pytest.raises(ConfigError, match="dtype is float32, which has no kernels on a GPU"):
        compute_dtype("float32", None, on_gpu=True)


def test_what_a_gpus_attention_does_not_take() -> None:
    with pytest.raises(ConfigError, match="block_size is 64, but a GPU's attention takes 16 or 32"):
        check_gpu(LLAMA_3_8B, EngineConfig.from_options({"block_size": 64}))
    with pytest.raises(ConfigError, match="use --device cpu"):
        check_gpu(replace(LLAMA_3_8B, head_dim=512), EngineConfig())
    check_gpu(LLAMA_3_8B, EngineConfig())
