"""A results record with round numbers, from which every derived figure can be worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common import Spread
from benchmarks.engines.base import ModelFacts
from benchmarks.report import BENCHMARK, SCHEMA


def model_facts(**changes: Any) -> ModelFacts:
    """A model of 1000 layer weights and a head of 100."""
    facts: dict[str, Any] = {
        "name": "Tiny",
        "path": Path("/models/tiny.gguf"),
        "description": "GGUF Q4_1",
        "quantization": "gguf",
        "vocab_size": 100,
        "max_position": 4096,
        "layer_params": 1000,
        "head_params": 100,
        "kv_values_per_token": 4,
        "tied": True,
        **changes,
    }
    return ModelFacts(**facts)


def engine(name: str, figures: dict[str, float], **changes: Any) -> dict[str, Any]:
    """A measured engine whose three runs lie 10% around each figure."""
    spreads = {key: Spread.of([0.9 * v, v, 1.1 * v]).to_json() for key, v in figures.items()}
    return {
        "name": name,
        "label": name,
        "version": "1.0",
        "status": "measured",
        "reason": None,
        "meaning": {},
        "weight_bytes_per_token": 1_000_000,
        "kv_bytes_per_token": 100,
        "results": spreads,
        **changes,
    }


def results() -> dict[str, Any]:
    """qengine and llama.cpp measured, transformers missing; decode context 32 + 129 / 2 = 96.5 tokens."""
    own = {"decode_1": 100.0, "decode_16": 300.0, "prompt": 1000.0, "first_token": 4.0, "peak_memory": 512 * 2**20}
    peer = {"decode_1": 50.0, "decode_16": 200.0, "prompt": 400.0, "first_token": 1.0, "peak_memory": 128 * 2**20}
    missing: dict[str, Any] = {
        "name": "transformers",
        "label": "transformers bf16",
        "version": None,
        "status": "not installed",
        "reason": "not installed: pip install gguf",
        "meaning": {},
    }
    workload: dict[str, Any] = {
        "threads": 2,
        "prompt_tokens": 512,
        "decode_prompt_tokens": 32,
        "decode_tokens": 128,
        "batches": [1, 16],
        "context_tokens": 2048,
        "runs": 3,
    }
    return {
        "schema": SCHEMA,
        "benchmark": BENCHMARK,
        "environment": {"cpu": "A <fast> & small CPU", "date": "2026-01-02T03:04:05+00:00", "command": "python -m x"},
        "model": {"name": "Tiny", "description": "GGUF Q4_1", "layer_params": 1000, "head_params": 100},
        "workload": workload,
        "bound": {"read_bytes_per_s": 1e9, "matmul_flop_per_s": {"bfloat16": 8e6, "float32": 2e6}},
        "disturbance": {"foreign_cpu_share": 0.01},
        "engines": [engine("qengine", own), engine("llama.cpp", peer), missing],
    }
