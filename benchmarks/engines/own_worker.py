"""The process in which qengine is measured: `python -m benchmarks.engines.own_worker TASK JSON-SPEC`.

Answers one JSON line on stdout. Only the engine's public interface is used; its options stay at their defaults.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

import torch

from benchmarks.common import BenchmarkError, Workload, answer, random_prompt, run_worker
from qengine import LLM, SamplingParams
from qengine.config import EngineConfig, LoadConfig
from qengine.engine import Engine
from qengine.errors import QEngineError
from qengine.models.shapes import LinearShape, head_linear, slots
from qengine.runtime.loader import open_model

#: Steps before the timed ones, and room for the sequences that start decoding while others still read their prompt.
_WARM_UP_STEPS = 8
_SPARE_TOKENS = 64


def describe(spec: Mapping[str, Any], channel: TextIO) -> None:
    """The facts of `ModelFacts`, from the headers alone."""
    opened = open_model(LoadConfig(model=spec["model"]))
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
    engine = Engine.start(EngineConfig.from_options({"model": spec["path"]}))
    seed = spec["round"] * 10_000
    time_prompt(engine, workload.prompt_tokens, seed + 1)
    prompt_s = time_prompt(engine, workload.prompt_tokens, seed + 2)
    decode = {}
    for batch in workload.batches:
        time_decode(engine, workload, batch, _WARM_UP_STEPS, seed + 1000)
        seconds = time_decode(engine, workload, batch, workload.decode_tokens, seed + 2000)
        decode[batch] = batch * workload.decode_tokens / seconds
    info = engine.info
    hidden_size = spec["model"]["head_params"] // info.vocab_size
    # The embedding is looked up row by row; a tied head has its own prepared copy, which is part of the weights.
    embedding_bytes = info.vocab_size * hidden_size * getattr(torch, info.dtype).itemsize
    record = {
        "prompt": workload.prompt_tokens / prompt_s,
        "decode": decode,
        "weight_bytes_per_token": info.weight_bytes - embedding_bytes,
        "kv_bytes_per_token": info.kv_cache_bytes // (info.num_blocks * info.block_size),
    }
    answer(channel, record)
    engine.shutdown()


def time_prompt(engine: Engine, num_tokens: int, seed: int) -> float:
    """Seconds from adding a prompt to its first token."""
    prompt = random_prompt(num_tokens, engine.info.vocab_size, seed)
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    pending = engine.make_request(f"prompt-{seed}", prompt, params)
    begin = time.perf_counter()
    engine.add(pending)
    outputs = []
    while engine.has_unfinished:
        outputs = engine.step()
    seconds = time.perf_counter() - begin
    if outputs[0].num_cached_tokens:
        raise BenchmarkError(f"{outputs[0].num_cached_tokens} prompt tokens came from the prefix cache")
    return seconds


def time_decode(engine: Engine, workload: Workload, batch: int, steps: int, seed: int) -> float:
    """Seconds of `steps` engine steps that give each of `batch` sequences one token.

    Raises:
        BenchmarkError: if some step served fewer sequences, as with a KV cache too small for all of them.
    """
    params = SamplingParams(temperature=0.0, max_tokens=steps + _SPARE_TOKENS + batch, ignore_eos=True)
    lengths: dict[str, int] = {}
    for index in range(batch):
        prompt = random_prompt(workload.decode_prompt_tokens, engine.info.vocab_size, seed + index)
        engine.add(engine.make_request(f"decode-{batch}-{seed + index}", prompt, params))
    while len(lengths) < batch:
        _step(engine, lengths)
    before = sum(lengths.values())
    begin = time.perf_counter()
    for _ in range(steps):
        _step(engine, lengths)
    seconds = time.perf_counter() - begin
    num_new = sum(lengths.values()) - before
    for request_id in lengths:
        engine.abort(request_id)
    if num_new != batch * steps:
        raise BenchmarkError(
            f"{steps} steps of {batch} sequences gave {num_new} tokens instead of {batch * steps}; "
            "the KV cache may be too small: use fewer sequences (--batch) or tokens (--decode-tokens)"
        )
    return seconds


def _step(engine: Engine, lengths: dict[str, int]) -> None:
    for output in engine.step():
        if output.error is not None:
            raise BenchmarkError(f"request {output.request_id} failed: {output.error}")
        num_tokens = len(output.outputs[0].token_ids)
        if num_tokens:
            lengths[output.request_id] = num_tokens


if __name__ == "__main__":
    tasks = {"describe": describe, "start": start, "speed": speed}
    sys.exit(run_worker(tasks, (QEngineError, BenchmarkError)))
