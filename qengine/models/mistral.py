"""Mistral 7B and its successors: Llama with a sliding window (v0.1) and a head size of its own (Nemo)."""

from __future__ import annotations

from qengine.models.spec import ModelSpec

MISTRAL = ModelSpec(
    name="mistral",
    architectures=("MistralForCausalLM",),
    sliding_window="always",
    defaults={
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
)
