"""The models that are measured end to end: sizes from their config.json, and folders that hold nothing else.

Weights are made up (`converters.dummy_source`), which costs and gives the same time as real ones. Values only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Config = Mapping[str, Any]

_LLAMA: Config = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
}
_LLAMA_2: Config = {**_LLAMA, "vocab_size": 32000, "max_position_embeddings": 4096, "rope_theta": 10000.0}


def _sizes(hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> Config:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


#: Sizes as published with the models.
CONFIGS: Mapping[str, Config] = {
    "llama-3-8b": {
        **_LLAMA,
        **_sizes(4096, 14336, 32, 32, 8),
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
    "llama-3-70b": {
        **_LLAMA,
        **_sizes(8192, 28672, 80, 64, 8),
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
    "llama-2-7b": {**_LLAMA_2, **_sizes(4096, 11008, 32, 32, 32)},
    "llama-2-13b": {**_LLAMA_2, **_sizes(5120, 13824, 40, 40, 40)},
}
#: What logits are compared on: real widths, few layers.
_MODERATE: Config = {
    **_sizes(2048, 5632, 4, 32, 8),
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
}
#: One of each kind of attention: plain, with norms of queries and keys, and with a window.
LOGIT_CONFIGS: Mapping[str, Config] = {
    "llama": {**_MODERATE, "architectures": ["LlamaForCausalLM"]},
    "qwen3 with qk_norm": {**_MODERATE, "architectures": ["Qwen3ForCausalLM"], "head_dim": 128},
    "mistral, window 256": {**_MODERATE, "architectures": ["MistralForCausalLM"], "sliding_window": 256},
}


def write_config(folder: Path, config: Config) -> Path:
    """A checkpoint folder without weights and without a tokenizer."""
    (folder / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
    return folder
