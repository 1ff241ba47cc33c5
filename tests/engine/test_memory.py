"""The plan and the engine that is built by it: what was planned is what is allocated, fits, and does not grow."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from qengine.config import EngineConfig
from qengine.engine import Engine
from qengine.errors import DoesNotFitError
from qengine.request import SamplingParams
from qengine.runtime.loader import open_model
from qengine.runtime.model_bytes import ModelFacts
from qengine.runtime.platform import Platform
from qengine.startup import start_on, start_parts
from quant_kernels.linear.dispatch import Target
from tests.engine.fixtures import NAMES, path
from tests.engine.triton_engine import run, start, tiny_folder

CPU = torch.device("cpu")
LIMITS = {"max_num_seqs": 8, "max_num_batched_tokens": 64}


def refuse(*args: object, **kwargs: object) -> NoReturn:
    raise AssertionError("a weight was read")


@pytest.mark.parametrize("name", NAMES)
def test_what_is_planned_is_allocated(name: str) -> None:
    config = EngineConfig.from_options({"model": path(name), "max_model_len": 128, **LIMITS})
    opened = open_model(config.load)
    platform = Platform(Target(CPU, torch.bfloat16))
    plan = platform.plan(opened, config)
    info = start_on(platform, config, opened).info
    [card] = plan.cards
    assert info.weight_bytes == card.weight_bytes
    # What is free changes between two plans, and with it the number of blocks.
    assert info.kv_cache_bytes == info.num_blocks * info.block_size * card.kv_bytes_per_token
    assert (info.max_model_len, info.max_num_batched_tokens) == (plan.max_model_len, plan.max_num_batched_tokens)


def cache_for(num_tokens: int, per_token: int) -> dict[str, Any]:
    return {"kv_cache_memory_bytes": num_tokens * per_token}


@pytest.mark.parametrize("num_blocks", [1, 3, 7])
def test_a_prompt_of_the_fitted_length_completes(tmp_path: Path, num_blocks: int) -> None:
    folder = tiny_folder(tmp_path)
    opened = open_model(EngineConfig.from_options({"model": folder, "load_format": "dummy"}).load)
    layer = 2 * opened.config.num_kv_heads * opened.config.head_dim * 4
    room = cache_for(16 * num_blocks, opened.config.num_layers * layer)
    engine = start(None, model=folder, load_format="dummy", dtype="float32", max_model_len="auto", **room, **LIMITS)
    assert (engine.info.num_blocks, engine.info.max_model_len) == (num_blocks, 16 * num_blocks)
    prompt = [1 + i % 50 for i in range(engine.info.max_model_len - 1)]
    [output] = run(engine, [prompt], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 1
    assert output.outputs[0].finish_reason == "length"
    [output] = run(engine, [[1]], SamplingParams(temperature=0, ignore_eos=True, max_tokens=10**6))
    assert len(output.outputs[0].token_ids) == engine.info.max_model_len - 1


@pytest.mark.parametrize("options", [{"kv_cache_memory_bytes": 1}, {"kv_cache_memory_bytes": "900TiB"}])
def test_what_does_not_fit_reads_no_weight(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    config = EngineConfig.from_options({"model": path("llama-gptq-sym-g128"), "device": "cpu", **options})
    opened = open_model(config.load)
    monkeypatch.setattr("converters.files.DataFile.read", refuse)
    for reader in ("read_linear", "read_tensor"):
        monkeypatch.setattr(type(opened.source), reader, refuse)
    with pytest.raises(DoesNotFitError) as caught:
        start_on(Platform(Target(CPU, torch.bfloat16)), config, opened)
    text = str(caught.value)
    assert "KV cache" in text
    assert "total" in text
    assert "What would help:" in text


def test_a_context_that_is_too_long_names_the_one_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("converters.safetensors_source.SafetensorsSource.read_tensor", refuse)
    model = path("llama-gptq-sym-g128")
    opened = open_model(EngineConfig.from_options({"model": model}).load)
    kv = opened.config.num_layers * 2 * opened.config.num_kv_heads * opened.config.head_dim * 2
    options = {"model": model, "device": "cpu", "max_model_len": 64, "kv_cache_memory_bytes": 48 * kv}
    with pytest.raises(DoesNotFitError, match=r"max_model_len is 64, .* use max_model_len 48 or less") as caught:
        start_parts(EngineConfig.from_options(options))
    assert "--max-model-len 48: the longest context that fits" in caught.value.table


def test_weights_larger_than_headers_tell_are_planned_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    honest = ModelFacts.of

    def forgetful(opened: Any) -> ModelFacts:
        facts = honest(opened)
        return ModelFacts(facts.name, facts.config, facts.tied, facts.linears[:-1])

    monkeypatch.setattr(ModelFacts, "of", forgetful)
    config = EngineConfig.from_options({"model": path("llama-gptq-sym-g128"), "max_model_len": 64, **LIMITS})
    parts = start_on(Platform(Target(CPU, torch.bfloat16)), config, open_model(config.load))
    assert "headers told of" in caplog.text
    assert parts.info.max_model_len == 64


# Growth

_PAGE = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


def steps_at_their_worst(engine: Engine, rounds: int) -> None:
    """Rounds of the longest prompts and the largest batches that the limits allow."""
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    for _ in range(rounds):
        run(engine, [[1 + i % 50 for i in range(100)]] * 8, params)


def test_memory_does_not_grow_after_the_worst_steps(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    limits = {**LIMITS, "max_model_len": 128, "enable_prefix_caching": False}
    engine = start(None, model=folder, load_format="dummy", dtype="float32", **limits)
    steps_at_their_worst(engine, 4)
    before = resident_bytes()
    steps_at_their_worst(engine, 12)
    assert resident_bytes() - before < 4 * 2**20
    assert engine.num_free_blocks == engine.info.num_blocks


def test_the_config_that_the_plan_was_made_for(tmp_path: Path) -> None:
    """A folder with nothing but a config.json runs, as it is planned."""
    folder = Path(tiny_folder(tmp_path))
    assert [p.name for p in folder.iterdir()] == ["config.json"]
    assert json.loads((folder / "config.json").read_text())["architectures"]
    engine = start(None, model=str(folder), load_format="dummy", dtype="float32", max_model_len=64, **LIMITS)
    assert engine.info.max_model_len == 64
