"""Options: sizes with suffixes, bounds, unknown names, and that nothing wrong gets through silently."""

from __future__ import annotations

from typing import Any

import pytest

from qengine.config import EngineConfig, parse_count, parse_memory
from qengine.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4096", 4096),
        ("8k", 8000),
        ("8K", 8192),
        ("1.5k", 1500),
        ("9007199254740993", 2**53 + 1),
        (str(2**63 - 1), 2**63 - 1),
        ("2m", 2_000_000),
        ("2M", 2 * 2**20),
        (77, 77),
    ],
)
def test_counts(text: str | int, value: int) -> None:
    assert parse_count(text) == value


@pytest.mark.parametrize("text", ["", "k", "1.5", "8kk", "ten", "9" * 400, "1e3", "0x10", "8 0"])
def test_bad_counts(text: str) -> None:
    with pytest.raises(ConfigError, match="max_model_len"):
        parse_count(text, "max_model_len")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("24GB", 24 * 2**30),
        ("24GiB", 24 * 2**30),
        ("24g", 24 * 2**30),
        ("24", 24 * 2**30),
        (24, 24 * 2**30),
        ("512MiB", 512 * 2**20),
        ("0.5 GB", 2**29),
        (4 * 2**30, 4 * 2**30),
        ("1000000B", 1_000_000),
    ],
)
def test_memory_sizes(text: str | int, value: int) -> None:
    assert parse_memory(text) == value


@pytest.mark.parametrize("text", ["0", "-1", "lots", "1XB", "", "nan", "9" * 400, "1" * 20 + "T", "0.1B"])
def test_bad_memory_sizes(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_memory(text)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"max_modellen": 5}, "did you mean 'max_model_len'"),
        ({"zzz": 5}, "unknown option 'zzz'"),
        ({"dtype": "int3"}, "dtype is 'int3'"),
        ({"quantization": "gptqq"}, "quantization"),
        ({"max_model_len": -1}, "max_model_len"),
        ({"max_model_len": True}, "max_model_len"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"block_size": 17}, "block_size"),
        ({"gpu_memory_utilization": 0}, "gpu_memory_utilization"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization"),
        ({"gpu_memory_utilization": float("nan")}, "gpu_memory_utilization"),
        ({"kv_cache_memory_bytes": 0}, "kv_cache_memory_bytes"),
        ({"kv_cache_dtype": "int4"}, "expected one of: auto, float16"),
        ({"kv_cache_dtype": "int7"}, "kv_cache_dtype"),
        ({"tensor_parallel_size": 65}, "65 processes, expected at most 64"),
        ({"tensor_parallel_size": 9, "pipeline_parallel_size": 8}, "72 processes"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size"),
        ({"pipeline_parallel_size": 0}, "pipeline_parallel_size"),
        ({"step_timeout": 0}, "step_timeout is 0, expected seconds above 0"),
        ({"step_timeout": float("inf")}, "step_timeout is inf"),
        ({"step_timeout": "60"}, "step_timeout is 60"),
        ({"seed": -1}, "seed"),
        ({"seed": True}, "seed"),
        ({"enable_prefix_caching": "no"}, "enable_prefix_caching"),
        ({"model": 5}, "model"),
        ({"device": "tpu"}, "device"),
        ({"load_format": "pickle"}, "load_format"),
        ({"bits": 4}, "bits is for load_format dummy alone"),
        ({"group_size": 128}, "group_size is for load_format dummy alone"),
        ({"load_format": "dummy", "group_size": 0}, "group_size"),
        ({"load_format": "dummy", "bits": True}, "bits"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        EngineConfig.from_options(options)


def test_options_find_their_section() -> None:
    config = EngineConfig.from_options(
        {"model": "m", "quantization": "awq_marlin", "dtype": "half", "max_model_len": "8K", "block_size": 32}
    )
    assert (config.load.model, config.load.quantization, config.load.dtype) == ("m", "awq", "float16")
    assert config.scheduler.max_model_len == 8192
    assert config.cache.block_size == 32
    assert EngineConfig.from_options({"max_model_len": "auto"}).scheduler.max_model_len == "auto"


def test_an_int_for_the_cache_is_bytes_and_text_is_a_size() -> None:
    assert EngineConfig.from_options({"kv_cache_memory_bytes": 500_000}).cache.kv_cache_memory_bytes == 500_000
    assert EngineConfig.from_options({"kv_cache_memory_bytes": "4"}).cache.kv_cache_memory_bytes == 4 * 2**30


def test_remote_code_is_accepted_and_has_no_effect(caplog: pytest.LogCaptureFixture) -> None:
    assert EngineConfig.from_options({"trust_remote_code": False}) == EngineConfig()
    assert not caplog.records
    assert EngineConfig.from_options({"trust_remote_code": True}) == EngineConfig()
    assert "no effect" in caplog.text
