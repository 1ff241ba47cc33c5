"""config.json values: what is accepted, what is refused, and that the message names the key."""

from __future__ import annotations

from typing import Any

import pytest

from qengine.config import ModelConfig
from qengine.errors import ConfigError
from qengine.models.registry import find_spec
from qengine.models.spec import read_model_config

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def read(**changes: Any) -> ModelConfig:
    raw = {k: v for k, v in {**BASE, **changes}.items() if v is not ...}
    return read_model_config(raw, find_spec(raw))


def test_defaults_are_those_of_transformers() -> None:
    config = read(num_key_value_heads=...)
    assert (config.num_kv_heads, config.head_dim, config.rms_norm_eps) == (4, 16, 1e-6)
    assert (config.rope.theta, config.rope.kind, config.tie_word_embeddings) == (10000.0, "default", False)
    assert config.windows == (None, None)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"vocab_size": 2**40}, "vocab_size"),
        ({"vocab_size": "100"}, "vocab_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"hidden_size": ...}, "hidden_size"),
        ({"hidden_size": 66}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_key_value_heads": 8}, "num_key_value_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": "big"}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ({"rope_freq_factors": 5}, "rope_freq_factors"),
        ({"rope_freq_factors": ["x"] * 8}, "rope_freq_factors"),
        ({"rope_freq_factors": [1.0]}, "rope_freq_factors"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"attention_bias": 1}, "attention_bias"),
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": ...}, "none named"),
        ({"architectures": "LlamaForCausalLM"}, "none named"),
    ],
)
def test_bad_values_are_refused_by_name(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        read(**changes)


def test_older_and_newer_rope_keys_agree() -> None:
    llama3 = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    older = read(rope_theta=500000.0, rope_scaling=llama3)
    newer = read(rope_parameters={**llama3, "rope_theta": 500000.0})
    assert older.rope == newer.rope
    assert older.rope.theta == 500000.0


def test_mistral_window_default_and_null() -> None:
    mistral = {"architectures": ["MistralForCausalLM"]}
    assert read(**mistral).windows == (4096, 4096)
    assert read(**mistral, sliding_window=None).windows == (None, None)


def test_qwen_windows() -> None:
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 8}
    assert read(architectures=["Qwen2ForCausalLM"], use_sliding_window=True, num_hidden_layers=30).windows == (
        *(None,) * 28,
        4096,
        4096,
    )
    assert read(**qwen).windows == (None, None)
    assert read(**qwen, use_sliding_window=True, max_window_layers=1).windows == (None, 8)
    types = ["sliding_attention", "full_attention"]
    assert read(**qwen, use_sliding_window=True, layer_types=types).windows == (8, None)
    for odd in (["linear_attention", "full_attention"], [["full_attention"], "full_attention"], ["full_attention"]):
        with pytest.raises(ConfigError, match="layer_types"):
            read(**qwen, use_sliding_window=True, layer_types=odd)


def test_eos_ids_may_be_a_list() -> None:
    assert read(eos_token_id=7).eos_token_ids == {7}
    assert read(eos_token_id=[7, 9, "x", -1]).eos_token_ids == {7, 9}
    assert read().eos_token_ids == frozenset()


def test_an_unknown_architecture_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM.*MistralForCausalLM.*Qwen2ForCausalLM.*Qwen3ForCausalLM"):
        find_spec({"architectures": ["Evil"], "auto_map": {"AutoModel": "evil.Model"}})
