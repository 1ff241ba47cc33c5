"""Many requests at once, of mixed lengths, through the scheduler; and transformers, which takes one after the other.

All requests are there when the clock starts; it stops with the last token. transformers' `generate` runs some of the
same requests on the same weights, expanded to 16 bits, and its rate over these stands for all: with one request at a
time, tokens per second depend on lengths alone. The first requests are a fair sample, since lengths are drawn alike.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Spread, random_prompt
from benchmarks.gpu.device import Machine, free_memory, memory_record
from benchmarks.gpu.engine import TokenEngine, engine_config, load, open_dummy, start
from benchmarks.gpu.models import CONFIGS, Config
from benchmarks.gpu.peer import transformers_model
from benchmarks.gpu.workloads import Serving, weights_text

_WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: its prompt, and how many tokens it wants."""

    prompt: list[int]
    num_tokens: int


def records(spec: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What the GPU's worker answers for a spec."""
    workload = Serving.from_json(spec["workload"])
    yield from measure(workload, CONFIGS[workload.model], Machine.cuda(torch.float16))


def measure(workload: Serving, config: Config, machine: Machine) -> Iterator[dict[str, Any]]:
    """A record of ours, then one of transformers."""
    base = {"model": workload.model, "weights": weights_text("gptq"), "requests": workload.requests}
    with tempfile.TemporaryDirectory() as folder:
        opened = open_dummy(Path(folder), config, "gptq", machine.device)
        longest = workload.prompt_range[1] + workload.output_range[1]
        settings = engine_config(
            memory_limit=workload.memory_limit, max_model_len=longest, max_num_seqs=workload.requests
        )
        platform = machine.make_platform(False)
        loaded = load(opened, platform, settings)
        engine = start(loaded, platform, settings)
        asked = draw(workload, opened.config.vocab_size)
        yield {**base, "contender": "qengine", **serve(workload, engine, asked), **memory_record(machine.device)}
        del engine, loaded, platform
        free_memory(machine.device, uncap=True)
        peer = transformers_model(config, opened, machine.dtype, machine.device)
    some = asked[: workload.peer_requests]
    yield {**base, "contender": "transformers", **one_by_one(peer, some), **memory_record(machine.device)}
    free_memory(machine.device)


def draw(workload: Serving, vocab_size: int) -> list[Asked]:
    """The requests, the same for everybody."""
    lengths = random.Random(workload.seed)
    return [
        Asked(
            random_prompt(lengths.randint(*workload.prompt_range), vocab_size, index),
            lengths.randint(*workload.output_range),
        )
        for index in range(workload.requests)
    ]


def serve(workload: Serving, engine: TokenEngine, asked: Sequence[Asked]) -> dict[str, Any]:
    """All requests at once, after a run that compiles kernels and records steps of every size that occurs."""
    seconds, num_steps = [], 0
    for _ in range(workload.runs + 1):
        for request in asked:
            engine.add(request.prompt, request.num_tokens)
        begun = time.perf_counter()
        num_steps = len(engine.run())
        seconds.append(time.perf_counter() - begun)
    spread = Spread.of(seconds[1:])
    tokens = sum(request.num_tokens for request in asked)
    return {
        "seconds": spread.median,
        "runs": list(spread.values),
        "output_tokens": tokens,
        "prompt_tokens": sum(len(request.prompt) for request in asked),
        "tokens_per_s": tokens / spread.median,
        "steps": num_steps,
        "preemptions": engine.scheduler.stats.num_preemptions,
    }


def one_by_one(model: Any, asked: Sequence[Asked]) -> dict[str, Any]:
    """transformers' `generate`, one request after the other, greedy; each to its whole length."""
    generate(model, asked[0].prompt, _WARM_UP_TOKENS)
    begun = time.perf_counter()
    for request in asked:
        generate(model, request.prompt, request.num_tokens)
    seconds = time.perf_counter() - begun
    tokens = sum(request.num_tokens for request in asked)
    return {"timed_requests": len(asked), "seconds": seconds, "output_tokens": tokens, "tokens_per_s": tokens / seconds}


@torch.inference_mode()
def generate(model: Any, prompt: Sequence[int], num_tokens: int) -> None:
    """Exactly `num_tokens` tokens; waits for them."""
    ids = torch.tensor([list(prompt)], device=next(model.parameters()).device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=num_tokens,
        max_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
        use_cache=True,
    )
    length = out.shape[1]
    assert length == len(prompt) + num_tokens, f"generate gave {length - len(prompt)} tokens instead of {num_tokens}"
    out.tolist()
