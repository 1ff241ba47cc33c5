"""Tiny models of every architecture, made by transformers, as folders; and a tokenizer that needs no files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from converters.skeleton import MODEL_TYPES

ARCHITECTURES = sorted(MODEL_TYPES)
VOCABULARY = 96


def make_model(architecture: str = "LlamaForCausalLM", *, seed: int = 0, **more: Any) -> Any:
    """A model in float32 with random weights; norms and biases are not the trivial ones that training starts from."""
    config = transformers.AutoConfig.for_model(
        MODEL_TYPES[architecture],
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": None,
            **more,
        },
    )
    torch.manual_seed(seed)
    model = getattr(transformers, architecture)._from_config(config, attn_implementation="sdpa").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.08)
    return model


def save_model(
    folder: Path, model: Any, dtype: torch.dtype = torch.float16, *, change: Mapping[str, torch.Tensor] | None = None
) -> Path:
    """Write a model without a tokenizer. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    save_file({**tensors, **(change or {})}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tiny_folder(folder: Path, architecture: str = "LlamaForCausalLM", **more: Any) -> Path:
    """`make_model`, saved in float16."""
    return save_model(folder, make_model(architecture, **more))


class Letters:
    """A tokenizer: one id for each byte."""

    chat_template: str | None = None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> Sequence[int]:
        return [byte % VOCABULARY for byte in text.encode()]

    def render_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        raise AssertionError("there is no chat template")


def write_texts(path: Path, count: int = 6, length: int = 40) -> Path:
    """JSONL rows of different lengths."""
    rows = [
        {"text": "".join(chr(40 + (7 * i + j * j) % 80) for j in range(length - 3 * (i % 3)))} for i in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path
