"""Llama 2, 3, 3.1 and 3.2, and the many models that share its architecture (SmolLM2 among them)."""

from __future__ import annotations

from qengine.models.spec import ModelSpec

LLAMA = ModelSpec(
    name="llama",
    architectures=("LlamaForCausalLM",),
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    mlp_bias="mlp_bias",
    defaults={"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 2048},
)
