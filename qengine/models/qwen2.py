"""Qwen2 and Qwen2.5: Llama with a bias on q, k and v."""

from __future__ import annotations

from qengine.models.spec import ModelSpec

QWEN2 = ModelSpec(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    qkv_bias=True,
    sliding_window="by_layer",
    defaults={
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
)
