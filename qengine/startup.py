"""From an EngineConfig to the parts of an engine: everything that happens once, at the start.

Order: check the file's headers, plan memory, load the tokenizer, then the weights, then the KV cache. Invariant: what
cannot work fails before a weight is read, with a message for the user. It runs no request.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from qengine.config import EngineConfig
from qengine.errors import ConfigError, LoadError
from qengine.layers.linear import Linear
from qengine.runtime.executors import Executor, UniprocExecutor
from qengine.runtime.inspection import summarize_loaded
from qengine.runtime.kv_cache import KVCache
from qengine.runtime.loader import OpenedModel, load_decoder, open_model
from qengine.runtime.planner import MemoryPlan, available_memory, plan_memory
from qengine.runtime.runner import ModelRunner
from qengine.scheduling.block_pool import BlockPool
from qengine.scheduling.scheduler import Scheduler, SchedulerLimits
from qengine.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_gguf

logger = logging.getLogger(__name__)

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine is running. Sizes in bytes and tokens, times in seconds."""

    model: str
    architecture: str
    quantization: str | None
    description: str
    dtype: str
    device: str
    max_model_len: int
    vocab_size: int
    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    weight_bytes: int
    kv_cache_bytes: int
    default_sampling: Mapping[str, Any] = field(default_factory=dict)
    start_seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What an engine is made of. `eos_token_ids` is the union of what model, generation config and tokenizer say."""

    info: EngineInfo
    tokenizer: Tokenizer
    scheduler: Scheduler
    executor: Executor
    eos_token_ids: frozenset[int]
    seed: int = 0


class _Stopwatch:
    """Seconds per named phase of the start."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._begin = self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = now - self._last
        self._last = now

    def total(self) -> dict[str, float]:
        return {**self.seconds, "total": time.perf_counter() - self._begin}


def start_parts(config: EngineConfig, *, show_progress: bool = False) -> EngineParts:
    """Load a model and everything that runs it.

    Raises:
        ConfigError: an option is wrong for this model or machine (found before weights are read).
        LoadError: the model cannot be found or loaded.
    """
    watch = _Stopwatch()
    device = choose_device(config.load.device)
    opened = open_model(config.load)
    dtype = choose_dtype(config.load.dtype, device)
    kv_dtype = dtype if config.cache.kv_cache_dtype == "auto" else _DTYPES[config.cache.kv_cache_dtype]
    plan = plan_memory(opened.config, config, kv_value_bytes=kv_dtype.itemsize, free_bytes=available_memory())
    watch.lap("checks")
    tokenizer = _load_tokenizer(config, opened)
    watch.lap("tokenizer")
    model = load_decoder(opened, dtype, device, plan.max_model_len, show_progress=show_progress)
    watch.lap("weights")
    cache = KVCache(opened.config, plan.num_blocks, plan.block_size, kv_dtype, device)
    watch.lap("kv cache")
    _log_kernels(model.linears())
    weight_bytes = sum(linear.num_bytes for linear in model.linears()) + model.embedding.num_bytes
    info = _info(config, opened, plan, dtype, device, weight_bytes)
    eos_token_ids = opened.eos_token_ids | tokenizer.eos_token_ids
    return EngineParts(
        info=replace(info, start_seconds=watch.total()),
        tokenizer=tokenizer,
        scheduler=_make_scheduler(config, plan, info),
        executor=UniprocExecutor(ModelRunner(model, cache)),
        eos_token_ids=frozenset(i for i in eos_token_ids if i < opened.config.vocab_size),
        seed=config.load.seed,
    )


def choose_device(name: str) -> torch.device:
    """The device to run on. "auto" is the CPU in this version.

    Raises:
        ConfigError: for a device that this version cannot use.
    """
    if name == "cuda":
        raise ConfigError("device 'cuda' is not available in this version, which runs on the CPU; use --device cpu")
    if name == "auto" and torch.cuda.is_available():
        logger.warning("a CUDA GPU is present, but this version runs on the CPU only")
    return torch.device("cpu")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype. "auto" on a CPU is bfloat16 for every file: its 4-bit kernel knows nothing else."""
    if name == "auto":
        return torch.bfloat16
    if name == "float16" and device.type == "cpu":
        logger.warning("dtype float16 has no 4-bit kernel on the CPU: weights are expanded at load and run slowly")
    return _DTYPES[name]


def _load_tokenizer(config: EngineConfig, opened: OpenedModel) -> Tokenizer:
    if config.load.tokenizer is not None:
        tokenizer = load_tokenizer(config.load.tokenizer)
    elif opened.gguf_metadata is not None:
        tokenizer = tokenizer_from_gguf(opened.gguf_metadata)
    else:
        tokenizer = load_tokenizer(str(opened.location.path))
    if tokenizer.vocab_size > opened.config.vocab_size:
        raise LoadError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the model's embedding has only "
            f"{opened.config.vocab_size}; give the model's own tokenizer with --tokenizer"
        )
    if config.load.chat_template is not None:
        tokenizer = tokenizer.with_chat_template(_read_template(config.load.chat_template))
    return tokenizer


def _read_template(choice: str) -> str:
    """The text of a template file, or `choice` itself where it is a template and not a path."""
    if "{{" in choice or "{%" in choice:
        return choice
    try:
        return Path(choice).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat_template '{choice}' is not a readable file: {error}") from error


def _make_scheduler(config: EngineConfig, plan: MemoryPlan, info: EngineInfo) -> Scheduler:
    limits = SchedulerLimits(
        max_num_seqs=info.max_num_seqs,
        max_num_batched_tokens=plan.max_num_batched_tokens,
        max_model_len=plan.max_model_len,
    )
    namespace = f"{info.model}/{info.dtype}/{config.cache.kv_cache_dtype}"
    pool = BlockPool(plan.num_blocks, plan.block_size, namespace=namespace)
    return Scheduler(limits, pool, enable_prefix_caching=config.cache.enable_prefix_caching)


def _log_kernels(linears: Iterable[Linear]) -> None:
    """One line per distinct linear shape as `qengine inspect` shows it: nothing slow is used in silence."""
    for summary in summarize_loaded(linears):
        logger.info("%s", summary.text)


def _info(
    config: EngineConfig,
    opened: OpenedModel,
    plan: MemoryPlan,
    dtype: torch.dtype,
    device: torch.device,
    weight_bytes: int,
) -> EngineInfo:
    model = opened.config
    return EngineInfo(
        model=opened.location.name,
        architecture=model.architecture,
        quantization=opened.source.quantization,
        description=opened.source.description,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        max_model_len=plan.max_model_len,
        vocab_size=model.vocab_size,
        block_size=plan.block_size,
        num_blocks=plan.num_blocks,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=plan.max_num_batched_tokens,
        weight_bytes=weight_bytes,
        kv_cache_bytes=plan.kv_cache_bytes,
        default_sampling=opened.default_sampling,
    )
