"""The measuring workers in this process, on a tiny checkpoint: what they count, never how long it took."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch

from benchmarks import probe
from benchmarks.engines import own_worker
from tests.engine.fixtures import path

MODEL = path("llama-awq-g64")


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
