"""The decoder against transformers in float32, for tiny random models of every architecture.

Whole prompts, chunks, mixed batches, fused qkv and gate_up, rope scalings, sliding windows, biases and tied heads.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from qengine.config import ModelConfig
from qengine.models.decoder import Decoder
from qengine.models.registry import find_spec
from qengine.models.spec import read_model_config
from tests.models.in_memory import Sequences, build_from_state

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("Llama", {}),
    "llama tied, biases": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama own head size": ("Llama", {"head_dim": 16}),
    "llama3.1": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama linear rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral window": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}


def make(case: str) -> tuple[transformers.PreTrainedModel, Decoder]:
    family, extra = CASES[case]
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **extra})
    config._attn_implementation = "eager"
    torch.manual_seed(len(case))
    oracle = getattr(transformers, f"{family}ForCausalLM")(config).eval().float()
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if parameter.dim() == 1 else 0.0))
    raw = {**config.to_dict(), "architectures": [f"{family}ForCausalLM"]}
    ours: ModelConfig = read_model_config(raw, find_spec(raw))
    return oracle, build_from_state(ours, oracle.state_dict())


def reference_logits(oracle: transformers.PreTrainedModel, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = oracle(torch.tensor([ids])).logits[0]
    return logits


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("case", CASES)
def test_logits_match_transformers(case: str) -> None:
    oracle, model = make(case)
    a, b = prompt(23, 1), prompt(9, 2)
    expected = {"a": reference_logits(oracle, a), "b": reference_logits(oracle, b)}

    whole = Sequences(model).step({"a": a, "b": b})
    for name, logits in whole.items():
        assert (logits - expected[name]).abs().max() < 1e-4

    chunked = Sequences(model)
    parts: dict[str, list[torch.Tensor]] = {"a": [], "b": []}
    for chunk in ({"a": a[:7]}, {"b": b[:8], "a": a[7:8]}, {"a": a[8:21], "b": b[8:]}, {"a": a[21:22]}, {"a": a[22:]}):
        for name, logits in chunked.step(chunk).items():
            parts[name].append(logits)
    for name, pieces in parts.items():
        assert (torch.cat(pieces) - expected[name]).abs().max() < 1e-4


@pytest.mark.parametrize("case", ["llama2", "qwen2", "qwen3"])
def test_qkv_and_gate_up_are_fused(case: str) -> None:
    _, model = make(case)
    for layer in model.layers:
        assert len(layer.attention.qkv.parts) == 1
        assert len(layer.mlp.gate_up.parts) == 1


def test_the_oracle_sees_the_window() -> None:
    """A window changes the logits: the sliding cases would not pass with full attention."""
    oracle, model = make("mistral window")
    ids = prompt(23, 1)
    full = Sequences(build_from_state(_without_window(model.config), oracle.state_dict())).step({"a": ids})["a"]
    assert (full - reference_logits(oracle, ids)).abs().max() > 1e-2


def _without_window(config: ModelConfig) -> ModelConfig:
    values = {name: getattr(config, name) for name in ModelConfig.__dataclass_fields__}
    return ModelConfig(**{**values, "windows": (None,) * config.num_layers})
