"""Llama-3-70B on two ranks, as far as a CPU shows it: each rank holds of a layer what the plan says, byte for byte.

Layers are alike: a plan that is right for one, and grows by the same bytes with each, is right for eighty.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qengine import LLM, SamplingParams
from qengine.config import EngineConfig
from qengine.runtime.messages import Loaded
from qengine.runtime.model_bytes import ModelFacts, weight_bytes
from qengine.runtime.opening import open_model_headers
from qengine.runtime.platform import Platform
from qengine.runtime.spawn_executor import SpawnExecutor

SHAPE = Path(__file__).parents[2] / "benchmarks" / "models" / "llama-3-70b" / "config.json"
OPTIONS: dict[str, Any] = {
    "load_format": "dummy",
    "quantization": "awq",
    "group_size": 128,
    "device": "cpu",
    "tensor_parallel_size": 2,
    "max_model_len": 64,
}


def shaped(folder: Path, num_layers: int, vocab_size: int) -> str:
    """A folder with the model's config.json, but for the number of layers and the vocabulary."""
    config = json.loads(SHAPE.read_text())
    assert (config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"]) == (80, 8192, 28672)
    changed = {**config, "num_hidden_layers": num_layers, "vocab_size": vocab_size}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(changed))
    return str(folder)


def planned(model: str) -> list[int]:
    """Bytes of each rank's weights by the headers alone."""
    facts = ModelFacts.of(open_model_headers(EngineConfig.from_options({"model": model, **OPTIONS}).load))
    kernels = Platform.of(torch.device("cpu"), torch.bfloat16, enforce_eager=True).machine.kernels
    return [weight_bytes(facts, rank, kernels, "bfloat16") for rank in facts.split(2).ranks]


def test_plans_grow_by_the_same_bytes_with_every_layer(tmp_path: Path) -> None:
    one, two, all_layers = (planned(shaped(tmp_path / str(n), n, 128256)) for n in (1, 2, 80))
    for first, second, whole in zip(one, two, all_layers, strict=True):
        assert whole == first + 79 * (second - first)


def test_each_rank_holds_of_a_layer_what_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Loaded] = []
    real: Callable[[SpawnExecutor], list[Loaded]] = SpawnExecutor.load

    def load(self: SpawnExecutor) -> list[Loaded]:
        found.extend(real(self))
        return found

    monkeypatch.setattr(SpawnExecutor, "load", load)
    model = shaped(tmp_path / "model", 1, 4096)
    with LLM(model, **OPTIONS) as llm:
        outputs = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)
    assert len(outputs[0].outputs[0].token_ids) == 2
    assert [rank.weight_bytes for rank in found] == planned(model)
    assert found[0].weight_bytes == found[1].weight_bytes > 855_638_016 // 4  # Half of the layer's codes at least.
