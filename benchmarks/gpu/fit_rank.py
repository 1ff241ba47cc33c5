"""One rank of `benchmarks.gpu.fit`: `python -m benchmarks.gpu.fit_rank SPEC`, started by it alone.

Each rank has a scheduler of its own. All of them get the same requests and sample the same tokens from the same
gathered logits, so they stay in step without being told, and a digest of the tokens shows that they did.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import answer, random_prompt, take_stdout
from benchmarks.gpu.device import Machine, free_memory, memory_record
from benchmarks.gpu.end_to_end import is_decode
from benchmarks.gpu.engine import StepTime, TokenEngine, engine_config, open_dummy
from benchmarks.gpu.models import Config
from benchmarks.gpu.workloads import Fit, weights_text
from qengine.config import EngineConfig
from qengine.models.decoder import Decoder
from qengine.parallel.group import TPGroup
from qengine.parallel.host_staged import HostStagedTransport
from qengine.parallel.seats import Seat
from qengine.parallel.transport import SingleTransport, Transport
from qengine.runtime import gpu_memory, planner
from qengine.runtime.kv_cache import KVCache
from qengine.runtime.loader import OpenedModel, load_decoder
from qengine.runtime.model_bytes import ModelFacts
from qengine.runtime.opening import split_opened
from qengine.runtime.planner import CONTEXT_BYTES, Card, MemoryPlan
from qengine.runtime.platform import Platform
from qengine.runtime.runner import ModelRunner
from qengine.scheduling.batch import Batch, StepResult
from qengine.scheduling.block_pool import BlockPool
from qengine.scheduling.scheduler import Scheduler, SchedulerLimits

#: Ranks wait for each other's loading in the first collective.
LIMIT_S = 300.0
#: Of the sequences that compile what is measured.
_WARM_UP_TOKENS = 4


class Witness:
    """A runner that keeps a digest of all tokens it has sampled."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._digest = hashlib.sha256()

    def step(self, batch: Batch) -> StepResult:
        result = self._runner.step(batch)
        self._digest.update(repr(sorted((name, token.token_id) for name, token in result.sampled.items())).encode())
        return result

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()


def main() -> int:
    """Run one rank on the GPU."""
    channel = take_stdout()
    spec = json.loads(sys.argv[1])
    with torch.no_grad():
        answer(channel, run(spec, Machine.cuda(torch.float16)))
    return 0


def run(spec: Mapping[str, Any], machine: Machine) -> dict[str, Any]:
    """Plan, load this rank's part, fill the cache, and say what it took."""
    transport = (
        SingleTransport() if spec["seat"] is None else HostStagedTransport(Seat.from_text(spec["seat"]), LIMIT_S)
    )
    try:
        return measure(Fit.from_json(spec["workload"]), spec["config"], machine, transport)
    finally:
        transport.close()


def measure(workload: Fit, config: Config, machine: Machine, transport: Transport) -> dict[str, Any]:
    """The record of one rank."""
    # Collectives through host memory cannot be recorded.
    platform = machine.make_platform(transport.size > 1)
    settings = engine_config(memory_limit=workload.memory_limit, max_model_len=workload.tokens)
    with tempfile.TemporaryDirectory() as folder:
        opened = open_dummy(Path(folder), config, workload.quantization, machine.device)
        plan = plan_on_cards(opened, settings, platform, workload.memory_limit, transport)
        decoder = load_part(opened, platform, plan, transport)
    loading = memory_record(machine.device)["peak_reserved"]
    free_memory(machine.device)
    engine, witness, cache = start(platform, settings, plan, decoder)
    sequences = workload.sequences or int(plan.max_concurrency)
    length = workload.tokens or plan.max_model_len
    warm_up(engine, sequences, length - workload.decode_tokens, opened.config.vocab_size)
    found = serve(engine, sequences, length - workload.decode_tokens, workload.decode_tokens, opened.config.vocab_size)
    card = plan.cards[transport.rank]
    return {
        "model": workload.model,
        "weights": weights_text(workload.quantization),
        "rank": transport.rank,
        "ranks": transport.size,
        "sequences": sequences,
        "context": length,
        "memory_limit": workload.memory_limit,
        "planned_bytes": card.total_bytes - card.free_bytes - CONTEXT_BYTES,
        "planned_weight_bytes": card.weight_bytes,
        "planned_kv_bytes": card.kv_bytes,
        "weight_bytes": decoder.num_bytes,
        "kv_bytes": cache.num_bytes,
        "peak_loading": loading,
        "tokens_digest": witness.digest,
        **memory_record(machine.device),
        **found,
    }


def plan_on_cards(
    opened: OpenedModel, settings: EngineConfig, platform: Platform, limit: int, transport: Transport
) -> MemoryPlan:
    """The plan for cards that have just the memory of the limit, and this process held to it."""
    here = platform.machine
    cards = tuple(Card(f"card {rank} of {limit / 2**30:g} GiB", limit) for rank in range(transport.size))
    planned = planner.Machine(here.kernels, cards, here.dtype, here.has_graphs)
    plan = planner.make_plan(ModelFacts.of(opened), settings, planned)
    if not plan.fits:
        raise SystemExit(f"the model does not fit: {plan.text}")
    if platform.device.type == "cuda":
        gpu_memory.cap_process(limit, platform.device)
    return plan


def load_part(opened: OpenedModel, platform: Platform, plan: MemoryPlan, transport: Transport) -> Decoder:
    """This rank's weights."""
    group = TPGroup(transport, split_opened(opened, transport.size)) if transport.size > 1 else None
    return load_decoder(opened, platform.target, plan.max_model_len, group=group)


def start(
    platform: Platform, settings: EngineConfig, plan: MemoryPlan, decoder: Decoder
) -> tuple[TokenEngine, Witness, KVCache]:
    """An engine around this rank's weights, with its part of the cache. Every rank samples."""
    kv_format = platform.kv_format(settings.cache.kv_cache_dtype)
    cache = KVCache(decoder.config, plan.num_blocks, plan.block_size, kv_format, platform.device)
    witness = Witness(platform.make_runner(decoder, cache, plan, plan.max_num_seqs))
    limits = SchedulerLimits(plan.max_num_seqs, plan.max_num_batched_tokens, plan.max_model_len)
    scheduler = Scheduler(limits, BlockPool(plan.num_blocks, plan.block_size), enable_prefix_caching=False)
    return TokenEngine(scheduler, witness, plan), witness, cache


def warm_up(engine: TokenEngine, sequences: int, prompt_tokens: int, vocab_size: int) -> None:
    """Compile and record what is measured: one long prompt, and decode steps of all sequences."""
    for index in range(sequences):
        num_tokens = prompt_tokens if index == 0 else min(prompt_tokens, _WARM_UP_TOKENS)
        engine.add(random_prompt(num_tokens, vocab_size, -1 - index), _WARM_UP_TOKENS)
    engine.run()


def serve(
    engine: TokenEngine, sequences: int, prompt_tokens: int, decode_tokens: int, vocab_size: int
) -> dict[str, Any]:
    """Fill the cache with all sequences at once; tokens per second of prompts, of decode steps and of all."""
    for index in range(sequences):
        engine.add(random_prompt(prompt_tokens, vocab_size, index), decode_tokens)
    steps = engine.run()
    decode = [step for step in steps if is_decode(step, sequences)]
    prefill = [step for step in steps if step.num_rows > step.num_sampled]
    return {
        "prompt_tokens_per_s": _rate(sum(step.num_rows for step in prefill), prefill),
        "decode_tokens_per_s": _rate(sequences * len(decode), decode),
        "decode_steps": len(decode),
        "output_tokens_per_s": _rate(sequences * decode_tokens, steps),
    }


def _rate(num_tokens: int, steps: list[StepTime]) -> float | None:
    return num_tokens / sum(step.seconds for step in steps) if steps else None


if __name__ == "__main__":
    sys.exit(main())
