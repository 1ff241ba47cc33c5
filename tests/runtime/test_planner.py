"""The memory plan: what fits, what does not, and the messages that say so."""

from __future__ import annotations

import logging

import pytest

from qengine.config import EngineConfig, ModelConfig, RopeConfig
from qengine.errors import ConfigError
from qengine.runtime.planner import MemoryPlan, available_memory, plan_memory

GIB = 2**30
# Llama-3-8B: 2 (keys, values) * 32 layers * 8 heads * 128 = 65,536 numbers a token, 131,072 bytes in bfloat16.
LLAMA_3_8B = ModelConfig("llama", 128256, 4096, 14336, 32, 32, 8, 128, 8192, 1e-5, RopeConfig(), False)
TOKEN_BYTES = 131_072


def plan(free_bytes: int, **options: object) -> MemoryPlan:
    return plan_memory(
        LLAMA_3_8B,
        EngineConfig.from_options(options),
        kv_bytes_per_token=2 * LLAMA_3_8B.kv_values_per_token,
        free_bytes=free_bytes,
    )


def test_plenty_of_memory_holds_four_full_sequences() -> None:
    result = plan(64 * GIB)
    assert (result.max_model_len, result.kv_bytes_per_token) == (8192, TOKEN_BYTES)
    assert result.num_blocks == 4 * 8192 // 16
    assert result.kv_cache_bytes == 4 * 8192 * TOKEN_BYTES


def test_never_more_than_a_quarter_of_free_memory() -> None:
    result = plan(8 * GIB)
    assert result.kv_cache_bytes <= 2 * GIB
    assert result.max_model_len == 8192


def test_the_models_own_length_is_lowered_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        result = plan(2 * GIB)
    assert result.max_model_len == 4096 == result.num_blocks * 16
    assert [r.getMessage() for r in caplog.records if "8192 to 4096" in r.getMessage()]
    assert len(caplog.records) == 1


def test_an_explicit_length_that_does_not_fit_names_the_one_that_does() -> None:
    with pytest.raises(ConfigError, match="use max_model_len 4096 or less"):
        plan(2 * GIB, max_model_len=8192)
    assert plan(2 * GIB, max_model_len=4096).max_model_len == 4096


def test_feasible_lengths_are_monotonic() -> None:
    def fits(length: int) -> bool:
        try:
            plan(2 * GIB, max_model_len=length)
        except ConfigError:
            return False
        return True

    assert [fits(n) for n in range(3000, 8192, 64)] == sorted((fits(n) for n in range(3000, 8192, 64)), reverse=True)


def test_longer_than_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="at most 8192 positions"):
        plan(64 * GIB, max_model_len=8193)


def test_an_absolute_size_overrides_the_share() -> None:
    result = plan(2 * GIB, kv_cache_memory_bytes="1GiB")
    assert result.kv_cache_bytes == GIB
    with pytest.raises(ConfigError, match="kv_cache_memory_bytes"):
        plan(64 * GIB, kv_cache_memory_bytes=2**20)
    with pytest.raises(ConfigError, match=r"only 2\.00 GiB of memory are free"):
        plan(2 * GIB, kv_cache_memory_bytes="1000GiB")


def test_auto_is_the_largest_that_fits() -> None:
    assert plan(2 * GIB, max_model_len="auto").max_model_len == 4096


def test_this_machine_has_memory() -> None:
    assert available_memory() > 2**26
