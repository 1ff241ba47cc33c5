"""The measuring workers in this process, on a tiny checkpoint: what they count, never how long it took."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import probe
from benchmarks.common import BenchmarkError, Workload
from benchmarks.engines import own_worker
from qengine.config import EngineConfig
from qengine.engine import Engine
from tests.engine.fixtures import path

MODEL = path("llama-awq-g64")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine.start(EngineConfig.from_options({"model": MODEL, "max_model_len": 256}))
    yield engine
    engine.shutdown()


def test_decode_counts_full_steps_and_leaves_the_engine_idle(engine: Engine) -> None:
    workload = Workload(threads=1, decode_prompt_tokens=40)
    for batch in (1, 8):
        assert own_worker.time_decode(engine, workload, batch, steps=4, seed=batch) > 0
        engine.check_integrity()
        assert not engine.has_unfinished
        assert engine.num_free_blocks == engine.info.num_blocks


def test_decode_refuses_to_count_when_sequences_had_to_wait() -> None:
    # Three sequences where two may run: the third gets its first token only after the others have ended.
    options = {"model": MODEL, "max_model_len": 128, "max_num_seqs": 2}
    engine = Engine.start(EngineConfig.from_options(options))
    try:
        with pytest.raises(BenchmarkError, match="gave 3 tokens instead of 9"):
            own_worker.time_decode(engine, Workload(threads=1, decode_prompt_tokens=8), batch=3, steps=3, seed=1)
    finally:
        engine.shutdown()


def test_prompts_are_never_served_from_the_cache(engine: Engine) -> None:
    assert own_worker.time_prompt(engine, 64, seed=7) > 0
    with pytest.raises(BenchmarkError, match="came from the prefix cache"):
        own_worker.time_prompt(engine, 64, seed=7)


def test_a_model_is_described_from_its_headers() -> None:
    channel = io.StringIO()
    own_worker.describe({"model": MODEL}, channel)
    facts = json.loads(channel.getvalue())
    config = json.loads(Path(MODEL, "config.json").read_text())
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    head_dim = hidden // config["num_attention_heads"]
    kv_size = config["num_key_value_heads"] * head_dim
    assert facts["layer_params"] == layers * (2 * hidden * hidden + 2 * hidden * kv_size + 3 * hidden * inner)
    assert facts["head_params"] == hidden * config["vocab_size"]
    assert facts["kv_values_per_token"] == 2 * layers * kv_size
    assert facts["path"].endswith("llama-awq-g64")


def test_the_buffer_is_larger_than_the_cache_but_fits_the_memory() -> None:
    assert probe.buffer_bytes(cache_bytes=2**30, free_bytes=2**40) == 8 * 2**30
    assert probe.buffer_bytes(cache_bytes=None, free_bytes=2**40) == probe.MIN_BUFFER_BYTES
    assert probe.buffer_bytes(cache_bytes=2**30, free_bytes=2**30) == 2**28
    assert probe.buffer_bytes(cache_bytes=None, free_bytes=0) == 4096


def test_the_probes_give_rates() -> None:
    assert probe.read_bandwidth(2**20, passes=2) > 0
    assert probe.matmul_rate(torch.float32, size=16, passes=2) > 0
