"""The models that are measured end to end: sizes from their config.json, and folders that hold nothing else.

Weights are made up (`converters.dummy_source`), which costs and gives the same time as real ones. Values only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Config = Mapping[str, Any]
#: One folder per model; `benchmarks.memory_table` plans them too.
MODELS = Path(__file__).parents[1] / "models"


def _sizes(hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> Config:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


#: Their config.json as published, but for what sizes do not depend on.
CONFIGS: Mapping[str, Config] = {
    folder.name: json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for folder in sorted(MODELS.iterdir())
    if folder.is_dir()
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
