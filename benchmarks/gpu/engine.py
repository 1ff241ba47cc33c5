"""An engine that takes and gives token ids: the real loader, platform, scheduler and runner, and no tokenizer.

`load` makes a model's weights on the device and lays them out for its kernels; `start` plans the memory around them
and puts scheduler and runner together, as `qengine.startup` does it; so one load serves several KV formats and both
ways to launch. `TokenEngine.step` is `Engine.step` without text, and says how long it took.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.gpu.models import Config, write_config
from converters.dummy_source import DummySource
from qengine.config import CacheConfig, EngineConfig, LoadConfig, SchedulerConfig
from qengine.models.decoder import Decoder
from qengine.request import Request, SamplingParams
from qengine.runtime.kv_cache import KVCache
from qengine.runtime.loader import OpenedModel, load_decoder, open_model
from qengine.runtime.planner import MemoryPlan, wanted_length
from qengine.runtime.platform import Platform
from qengine.runtime.runner import ModelRunner
from qengine.scheduling.block_pool import BlockPool
from qengine.scheduling.scheduler import Scheduler, SchedulerLimits

#: The platform for launching steps one by one (True), or with recorded decode steps.
MakePlatform = Callable[[bool], Platform]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model whose weights are on the device. `opened.source` makes the same weights again, in any order."""

    opened: OpenedModel
    decoder: Decoder
    load_seconds: float

    @property
    def weight_bytes_per_step(self) -> int:
        """Bytes of weights that a step reads, however many rows it has; the embedding's few rows not counted."""
        return sum(part.bytes_per_pass for linear in self.decoder.linears() for part in linear.parts)


@dataclass(frozen=True, slots=True)
class StepTime:
    """One step: seconds from scheduling to its tokens on the host, rows computed and tokens sampled."""

    seconds: float
    num_rows: int
    num_sampled: int


class TokenEngine:
    """Scheduler and runner. Sampling is greedy and nothing ends before its length."""

    def __init__(self, scheduler: Scheduler, runner: ModelRunner, plan: MemoryPlan) -> None:
        self.scheduler = scheduler
        self.plan = plan
        self._runner = runner
        self._ids = itertools.count()

    def add(self, prompt: Sequence[int], max_tokens: int) -> None:
        """Queue a request."""
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        name = str(next(self._ids))
        self.scheduler.add(Request(name, list(prompt), params, max_tokens=max_tokens, arrival_time=time.monotonic()))

    def step(self) -> StepTime:
        """Run one step and wait for its tokens."""
        begun = time.perf_counter()
        batch = self.scheduler.schedule()
        result = self._runner.step(batch)
        self.scheduler.update(batch, result)
        assert not result.failed, f"a step failed: {result.failed}"
        return StepTime(time.perf_counter() - begun, batch.num_tokens, len(result.sampled))

    def run(self) -> list[StepTime]:
        """Step until nothing is left."""
        times = []
        while self.scheduler.has_unfinished:
            times.append(self.step())
        return times


def open_dummy(folder: Path, config: Config, quantization: str | None, device: torch.device) -> OpenedModel:
    """A model of made-up weights that are made on the device."""
    path = write_config(folder, config)
    opened = open_model(LoadConfig(model=str(path), load_format="dummy", quantization=quantization))
    return replace(opened, source=DummySource.open(path, quantization, 0, device))


def load(opened: OpenedModel, platform: Platform, config: EngineConfig) -> LoadedModel:
    """Make the weights and lay them out, within the memory that the configuration allows."""
    platform.check(opened.config, config)
    platform.plan(opened, config)  # Holds torch to what is allowed, and refuses what will not fit.
    begun = time.perf_counter()
    decoder = load_decoder(opened, platform.target, wanted_length(opened.config, config.scheduler.max_model_len))
    return LoadedModel(opened, decoder, time.perf_counter() - begun)


def start(loaded: LoadedModel, platform: Platform, config: EngineConfig) -> TokenEngine:
    """An engine around weights that are loaded."""
    model, limits = loaded.opened.config, config.scheduler
    kv_format = platform.kv_format(config.cache.kv_cache_dtype)
    plan = platform.plan(loaded.opened, config, measured_weights=loaded.decoder.num_bytes)
    cache = KVCache(model, plan.num_blocks, plan.block_size, kv_format, platform.device)
    runner = platform.make_runner(model, loaded.decoder, cache, plan, limits.max_num_seqs)
    scheduler = Scheduler(
        SchedulerLimits(limits.max_num_seqs, plan.max_num_batched_tokens, plan.max_model_len),
        BlockPool(plan.num_blocks, plan.block_size),
        enable_prefix_caching=config.cache.enable_prefix_caching,
    )
    return TokenEngine(scheduler, runner, plan)


def engine_config(
    *,
    memory_limit: int | None,
    max_model_len: int | None = None,
    kv_cache_dtype: str = "auto",
    max_num_seqs: int = 256,
) -> EngineConfig:
    """What all measurements share. Prompts are random, so there is no prefix to find."""
    return EngineConfig(
        cache=CacheConfig(kv_cache_dtype=kv_cache_dtype, gpu_memory_limit=memory_limit, enable_prefix_caching=False),
        scheduler=SchedulerConfig(max_model_len=max_model_len, max_num_seqs=max_num_seqs),
    )
