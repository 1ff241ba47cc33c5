"""The worst step: as large as the plan allows, on the CPU and on Triton's kernels, and gone without a trace."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch

from qengine.config import EngineConfig
from qengine.request import SamplingParams
from qengine.runtime.kv_cache import KVCache
from qengine.runtime.loader import load_decoder, open_model
from qengine.runtime.planner import MemoryPlan
from qengine.runtime.platform import Platform
from qengine.runtime.warm_up import run_worst_step, worst_batch
from quant_kernels.linear.dispatch import Target
from tests.engine.triton_engine import tiny_folder, triton_platform

CPU = torch.device("cpu")


def plan(*, rows: int, seqs: int, length: int, num_blocks: int) -> MemoryPlan:
    return MemoryPlan(length, length, True, rows, seqs, 16, num_blocks, ())


@pytest.mark.parametrize(
    ("sizes", "lengths"),
    [
        ((64, 4, 128, 40), [61, 1, 1, 1]),
        ((64, 4, 20, 40), [20, 20, 20, 4]),
        ((64, 4, 8, 40), [8, 8, 8, 8]),
        ((64, 1, 128, 40), [64]),
        ((3, 8, 128, 40), [1, 1, 1]),
        ((64, 4, 128, 1), [16, 16, 16, 16]),
    ],
)
def test_the_worst_batch(sizes: tuple[int, int, int, int], lengths: list[int]) -> None:
    rows, seqs, length, num_blocks = sizes
    batch = worst_batch(plan(rows=rows, seqs=seqs, length=length, num_blocks=num_blocks), SamplingParams())
    assert [entry.num_tokens for entry in batch.entries] == lengths
    for entry in batch.entries:
        assert len(entry.block_ids) == -(-entry.num_tokens // 16)
        assert all(0 <= block_id < num_blocks for block_id in entry.block_ids)
        assert entry.sample is not None
    assert len(batch.entries[0].prompt_targets) == min(lengths[0], 64)
    assert batch.entries[0].num_prompt_logprobs is not None


@pytest.mark.parametrize("platform", [Platform(Target(CPU, torch.float32)), triton_platform()], ids=["cpu", "triton"])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_it_runs_and_leaves_the_cache_as_it_was(
    tmp_path: Path, platform: Platform, kv_cache_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"model": tiny_folder(tmp_path), "load_format": "dummy", "max_model_len": 64}
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 48, "kv_cache_dtype": kv_cache_dtype}
    config = EngineConfig.from_options({**options, **limits})
    opened = open_model(config.load)
    found = platform.plan(opened, config)
    kv_format = platform.kv_format(kv_cache_dtype)
    cache = KVCache(opened.config, 8, 16, kv_format, CPU)
    decoder = load_decoder(opened, platform.target, 64)
    small = MemoryPlan(64, 64, True, found.max_num_batched_tokens, found.max_num_seqs, 16, 8, ())
    runner, rows = platform.make_runner(decoder, cache, small, 4), []
    logits = decoder.logits
    monkeypatch.setattr(decoder, "logits", lambda hidden: rows.append(len(hidden)) or logits(hidden))
    batch = run_worst_step(runner, small)
    assert rows == [4, 32, 13]
    assert batch.num_tokens == 48
    assert not any(bool(part.any()) for layer in cache.layers for part in layer.parts())


def test_logits_of_prompts_are_made_when_those_of_samples_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the plan counts the larger of the two, and no more than two pieces of a prompt at one time."""
    options = {"model": tiny_folder(tmp_path), "load_format": "dummy", "max_model_len": 256}
    opened = open_model(EngineConfig.from_options(options).load)
    platform = Platform(Target(CPU, torch.float32))
    small = plan(rows=160, seqs=4, length=256, num_blocks=16)
    decoder = load_decoder(opened, platform.target, 256)
    runner = platform.make_runner(decoder, KVCache(opened.config, 16, 16, platform.kv_format("auto"), CPU), small, 4)
    logits, made, alive = decoder.logits, [], []

    def watched(hidden: torch.Tensor) -> torch.Tensor:
        alive.append([rows for rows, reference in made if reference() is not None])
        found = logits(hidden)
        made.append((len(found), weakref.ref(found)))
        return found

    monkeypatch.setattr(decoder, "logits", watched)
    run_worst_step(runner, small)
    assert alive == [[], [], [32]]
