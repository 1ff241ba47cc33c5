"""The process in which qengine is measured: `python -m benchmarks.engines.own_worker TASK JSON-SPEC`.

Answers one JSON line on stdout. Only the engine's public interface is used; its options stay at their defaults.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TextIO

import torch

from benchmarks.common import BenchmarkError, Workload, answer, run_worker
from qengine import LLM, SamplingParams
from qengine.bench.offline import WARM_UP_STEPS, time_decode, time_prompt
from qengine.config import EngineConfig, LoadConfig
from qengine.engine import Engine
from qengine.errors import QEngineError
from qengine.models.shapes import LinearShape, head_linear, slots
from qengine.runtime.inspection import inspect_model
from qengine.runtime.loader import open_model
from quant_kernels.linear.dispatch import Target


def describe(spec: Mapping[str, Any], channel: TextIO) -> None:
    """The facts of `ModelFacts`, from the headers alone."""
    opened = open_model(LoadConfig(model=spec["model"], **spec.get("options", {})))
    config = opened.config
    head = head_linear(config, tied=opened.tied)
    linears = [s for s in slots(config, tied=opened.tied) if isinstance(s, LinearShape) and s.name != head.name]
    record = {
        "name": opened.location.name,
        "path": str(opened.location.path.resolve()),
        "description": opened.source.description,
        "quantization": opened.source.quantization,
        "vocab_size": config.vocab_size,
        "max_position": config.max_position,
        "layer_params": sum(s.in_features * s.out_features for s in linears),
        "head_params": head.in_features * head.out_features,
        "kv_values_per_token": config.kv_values_per_token,
        "tied": opened.tied,
    }
    answer(channel, record)


def start(spec: Mapping[str, Any], channel: TextIO) -> None:
    """Load and answer one token; the parent watches the clock."""
    torch.set_num_threads(spec["workload"]["threads"])
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    with LLM(spec["path"], max_model_len=spec["context_tokens"]) as llm:
        output = llm.generate(spec["text"], params, use_tqdm=False)[0]
        answer(channel, {"text": output.outputs[0].text})


def speed(spec: Mapping[str, Any], channel: TextIO) -> None:
    """Time one prompt and the decoding of each batch size, after a short warm-up of each."""
    workload = Workload.from_json(spec["workload"])
    torch.set_num_threads(workload.threads)
    config = EngineConfig.from_options({"model": spec["path"], **spec.get("options", {})})
    engine = Engine.start(config)
    seed = spec["round"] * 10_000
    time_prompt(engine, workload.prompt_tokens, seed + 1)
    prompt_s = time_prompt(engine, workload.prompt_tokens, seed + 2)
    decode = {}
    for batch in workload.batches:
        sizes = {"batch": batch, "prompt_len": workload.decode_prompt_tokens}
        time_decode(engine, **sizes, num_steps=WARM_UP_STEPS, seed=seed + 1000)
        seconds = time_decode(engine, **sizes, num_steps=workload.decode_tokens, seed=seed + 2000)
        decode[batch] = batch * workload.decode_tokens / seconds
    info = engine.info
    target = Target.of(torch.device(info.device), getattr(torch, info.dtype))
    record = {
        "prompt": workload.prompt_tokens / prompt_s,
        "decode": decode,
        "weight_bytes_per_token": inspect_model(open_model(config.load), target).num_bytes,
        "kv_bytes_per_token": info.kv_cache_bytes // (info.num_blocks * info.block_size),
    }
    answer(channel, record)
    engine.shutdown()


if __name__ == "__main__":
    tasks = {"describe": describe, "start": start, "speed": speed}
    sys.exit(run_worker(tasks, (QEngineError, BenchmarkError)))
