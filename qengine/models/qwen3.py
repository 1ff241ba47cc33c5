"""Qwen3 (dense): Llama with a norm on every query and key head."""

from __future__ import annotations

from qengine.models.spec import ModelSpec

QWEN3 = ModelSpec(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    qk_norm=True,
    sliding_window="by_layer",
    defaults={
        "head_dim": 128,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
)
