"""Checkpoints that nobody trained: real formats and shapes on the disk, random numbers inside.

Invariant: a folder that `write_checkpoint` wrote loads like a published one, in shards of some layers each. Nothing is
downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qengine.config import ModelConfig
from qengine.models.registry import find_spec
from qengine.models.shapes import LinearShape, TensorShape, slots
from qengine.models.spec import read_model_config

GROUP_SIZE = 128
METHODS = ("gptq", "awq", "none")
#: GPTQ stores zero points less one: sevens are the middle of four bits.
_SEVENS = 0x77777777
_TENSORS_PER_SHARD = 64


@dataclass(frozen=True, slots=True)
class Sizes:
    """A Llama of some shape; where it is tied, its embedding is its head."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    num_layers: int
    vocab_size: int = 32000
    is_tied: bool = True

    @property
    def config(self) -> dict[str, Any]:
        """What config.json says of it."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "num_hidden_layers": self.num_layers,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": self.is_tied,
            "torch_dtype": "bfloat16",
        }


#: The layers of Llama-3-8B.
LLAMA_8B = Sizes(4096, 14336, 32, 8, 32)


def write_checkpoint(folder: Path, sizes: Sizes, method: str) -> None:
    """Write config.json, an index and shards. `method` is one of METHODS; "none" leaves weights in bfloat16."""
    config = sizes.config
    if method != "none":
        more = {"version": "gemm", "zero_point": True} if method == "awq" else {"sym": True, "desc_act": False}
        config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": GROUP_SIZE, **more}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    model: ModelConfig = read_model_config(config, find_spec(config))
    random = torch.Generator().manual_seed(0)
    shards: list[dict[str, torch.Tensor]] = [{}]
    places: dict[str, str] = {}
    for shape in slots(model, tied=sizes.is_tied):
        shards[-1].update(_tensors(shape, method, random))
        if len(shards[-1]) >= _TENSORS_PER_SHARD:
            _write_shard(folder, len(places), shards[-1], places)
            shards[-1] = {}
    _write_shard(folder, len(places), shards[-1], places)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def _write_shard(folder: Path, number: int, tensors: Mapping[str, torch.Tensor], places: dict[str, str]) -> None:
    if tensors:
        name = f"model-{number:05d}.safetensors"
        save_file(dict(tensors), folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, name))


def _tensors(shape: LinearShape | TensorShape, method: str, random: torch.Generator) -> dict[str, torch.Tensor]:
    if isinstance(shape, TensorShape):
        if len(shape.shape) == 1:
            return {shape.name: torch.ones(shape.shape, dtype=torch.bfloat16)}
        return {shape.name: torch.randn(shape.shape, generator=random, dtype=torch.bfloat16)}
    rows, columns = shape.in_features, shape.out_features
    if method == "none":
        weight = torch.randn(columns, rows, generator=random, dtype=torch.bfloat16).mul_(rows**-0.5)
        return {f"{shape.name}.weight": weight}
    groups = rows // GROUP_SIZE
    words = (rows, columns // 8) if method == "awq" else (rows // 8, columns)
    zeros = _words((groups, columns // 8), random) if method == "awq" else torch.full((groups, columns // 8), _SEVENS)
    return {
        f"{shape.name}.qweight": _words(words, random),
        f"{shape.name}.qzeros": zeros.to(torch.int32),
        f"{shape.name}.scales": torch.full((groups, columns), rows**-0.5 / 4.6, dtype=torch.float16),
    }


def _words(shape: tuple[int, int], random: torch.Generator) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31 - 1, shape, generator=random, dtype=torch.int32)
