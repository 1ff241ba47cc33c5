"""One model end to end: tokens per second, where a step's time goes, and what fits into the memory that is allowed.

Decode is a number of sequences with short prompts that each get one token a step; the figure is the median of several
runs after one that compiles and records. Prefill is one long prompt in one step. A step's bound is the bytes that it
must read, weights and KV cache, over the bandwidth of a copy that the part measures itself. Weights are made up and
sampling is greedy; scheduling, sampling and the way of tokens to the host are included, text is not.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Spread, random_prompt
from benchmarks.gpu.device import Machine, free_memory, kernel_seconds, memory_record
from benchmarks.gpu.engine import LoadedModel, StepTime, TokenEngine, engine_config, load, open_dummy, start
from benchmarks.gpu.models import CONFIGS, Config
from benchmarks.gpu.workloads import EndToEnd, weights_text
from quant_kernels.attention.kv_format import KVFormat

#: Steps that the profiler watches.
PROFILED_STEPS = 16
#: How an engine may be started: the KV cache's format, and whether steps are launched one by one.
VARIANTS: Mapping[str, tuple[str, bool]] = {
    "graphs": ("auto", False),
    "eager": ("auto", True),
    "KV int8": ("int8", False),
}
#: Formats whose number of blocks is told.
KV_NAMES = ("auto", "int8", "fp8_e4m3", "fp8_e5m2")


def records(spec: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What the GPU's worker answers for a spec."""
    workload = EndToEnd.from_json(spec["workload"])
    yield from measure(workload, CONFIGS[workload.model], Machine.cuda(torch.float16))


def measure(workload: EndToEnd, config: Config, machine: Machine) -> Iterator[dict[str, Any]]:
    """Records of one model: what fits, then speeds of each variant."""
    base = {
        "model": workload.model,
        "weights": weights_text(workload.quantization),
        "copy_bytes_per_s": machine.copy_bytes_per_s,
    }
    with tempfile.TemporaryDirectory() as folder:
        opened = open_dummy(Path(folder), config, workload.quantization, machine.device)
        first = engine_config(memory_limit=workload.memory_limit)
        loaded = load(opened, machine.make_platform(False), first)
    free_memory(machine.device)
    yield {**base, "what": "memory", **capacity(workload, loaded, machine)}
    steps: dict[tuple[str, int], float] = {}
    for variant in workload.variants:
        for record in measure_variant(workload, variant, loaded, machine):
            yield {**base, "variant": variant, **record}
            if record.get("status") == "measured":
                steps[variant, record["batch"]] = record["step_seconds"]
        free_memory(machine.device)
    # Last, so that a profiler that breaks takes no speeds with it.
    for variant in workload.variants:
        batches = {batch: seconds for (name, batch), seconds in steps.items() if name == variant}
        for record in profile_variant(workload, variant, loaded, machine, batches):
            yield {**base, "variant": variant, **record}
        free_memory(machine.device)


def capacity(workload: EndToEnd, loaded: LoadedModel, machine: Machine) -> dict[str, Any]:
    """Bytes of weights, and the tokens that the cache would hold in each format."""
    platform = machine.make_platform(False)
    plans = {}
    for name in KV_NAMES:
        config = engine_config(memory_limit=workload.memory_limit, kv_cache_dtype=name)
        plan = platform.plan(loaded.opened, config, measured_weights=loaded.decoder.num_bytes)
        plans[name] = {"blocks": plan.num_blocks, "tokens": plan.num_blocks * plan.block_size}
    return {
        "memory_limit": workload.memory_limit,
        "weight_bytes": loaded.decoder.num_bytes,
        "load_seconds": loaded.load_seconds,
        "kv": plans,
    }


def start_variant(
    workload: EndToEnd, variant: str, loaded: LoadedModel, machine: Machine
) -> tuple[TokenEngine, KVFormat]:
    """An engine, and the format of its cache."""
    kv_name, eager = VARIANTS[variant]
    platform = machine.make_platform(eager)
    config = engine_config(memory_limit=workload.memory_limit, kv_cache_dtype=kv_name)
    return start(loaded, platform, config), platform.kv_format(kv_name)


def measure_variant(
    workload: EndToEnd, variant: str, loaded: LoadedModel, machine: Machine
) -> Iterator[dict[str, Any]]:
    """Decode at every batch, and prefill, of one engine."""
    engine, kv_format = start_variant(workload, variant, loaded, machine)
    model = loaded.opened.config
    per_token = model.num_layers * kv_format.bytes_per_token(model.num_kv_heads, model.head_dim)
    yield {"what": "prefill", **prefill(workload, engine, model.vocab_size)}
    for batch in workload.batches:
        needed = batch * engine.scheduler.pool.num_blocks_for(workload.prompt_tokens + workload.decode_tokens)
        if needed > engine.plan.num_blocks:
            why = f"{needed} KV blocks are needed and {engine.plan.num_blocks} fit"
            yield {"what": "decode", "batch": batch, "status": "left out", "why": why}
            continue
        found = decode(workload, engine, batch, model.vocab_size)
        context = workload.prompt_tokens + (workload.decode_tokens + 1) / 2
        num_bytes = loaded.weight_bytes_per_step + int(batch * context * per_token)
        bound = num_bytes / machine.copy_bytes_per_s
        yield {
            "what": "decode",
            "batch": batch,
            "status": "measured",
            "bytes_per_step": num_bytes,
            "of_bound": bound / found["step_seconds"],
            **found,
        }
    yield {"what": "peak", **memory_record(machine.device)}


def prefill(workload: EndToEnd, engine: TokenEngine, vocab_size: int) -> dict[str, Any]:
    """Prompt tokens per second of one long prompt."""
    seconds = []
    for run in range(workload.runs + 1):
        engine.add(random_prompt(workload.prefill_tokens, vocab_size, run), 1)
        seconds.append(sum(step.seconds for step in engine.run()))
    spread = Spread.of([workload.prefill_tokens / s for s in seconds[1:]])
    return {"prompt_tokens": workload.prefill_tokens, "tokens_per_s": spread.median, "runs": list(spread.values)}


def decode(workload: EndToEnd, engine: TokenEngine, batch: int, vocab_size: int) -> dict[str, Any]:
    """Tokens per second of all sequences together, and seconds of a step."""
    rates = []
    for run in range(workload.runs + 1):
        add_all(workload, engine, batch, vocab_size, run)
        steps = [step for step in engine.run() if is_decode(step, batch)]
        assert steps, f"{batch} sequences never ran together"
        rates.append(batch * len(steps) / sum(step.seconds for step in steps))
    spread = Spread.of(rates[1:])
    return {"tokens_per_s": spread.median, "runs": list(spread.values), "step_seconds": batch / spread.median}


def profile_variant(
    workload: EndToEnd, variant: str, loaded: LoadedModel, machine: Machine, batches: Mapping[int, float]
) -> Iterator[dict[str, Any]]:
    """The part of a decode step that passes outside kernels, by the seconds that a step of each batch takes."""
    engine, _ = start_variant(workload, variant, loaded, machine)
    for batch, seconds in batches.items():
        in_kernels = profiled_step(workload, engine, batch, loaded.opened.config.vocab_size, machine.device)
        outside = None if in_kernels is None else max(0.0, 1.0 - in_kernels / seconds)
        yield {"what": "profile", "batch": batch, "kernel_seconds": in_kernels, "outside_kernels": outside}


def add_all(workload: EndToEnd, engine: TokenEngine, batch: int, vocab_size: int, run: int) -> None:
    for index in range(batch):
        prompt = random_prompt(workload.prompt_tokens, vocab_size, 1000 * run + index)
        # The prompt's own step gives the first token; the others are decoded.
        engine.add(prompt, workload.decode_tokens + 1)


def is_decode(step: StepTime, batch: int) -> bool:
    """Whether every sequence got one token, and nothing else was computed."""
    return step.num_rows == step.num_sampled == batch


def profiled_step(
    workload: EndToEnd, engine: TokenEngine, batch: int, vocab_size: int, device: torch.device
) -> float | None:
    """Seconds of a decode step that the device spends in kernels. The profiler slows the host, not the kernels."""
    add_all(workload, engine, batch, vocab_size, workload.runs + 1)
    while engine.scheduler.has_unfinished and not is_decode(engine.step(), batch):
        pass
    num_steps = min(PROFILED_STEPS, workload.decode_tokens - 2)
    total = kernel_seconds(lambda: [engine.step() for _ in range(num_steps)], device)
    engine.run()
    return None if total is None else total / num_steps
