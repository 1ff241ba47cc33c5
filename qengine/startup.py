"""From an EngineConfig to the parts of an engine: everything that happens once, at the start.

Order: check the file's headers, plan memory, load the tokenizer, then the weights, then the KV cache, and let the model
run once. Invariant: what cannot work fails before a weight is read, with a message for the user. It runs no request.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qengine.config import EngineConfig
from qengine.errors import ConfigError, LoadError
from qengine.layers.linear import Linear
from qengine.runtime.checkpoint_check import examine, judge
from qengine.runtime.executors import Executor, UniprocExecutor
from qengine.runtime.inspection import summarize_loaded
from qengine.runtime.kv_cache import KVCache
from qengine.runtime.loader import OpenedModel, load_timed, open_model
from qengine.runtime.planner import MemoryPlan, size_text
from qengine.runtime.platform import Platform, choose_device, choose_dtype
from qengine.runtime.runner import ModelRunner
from qengine.runtime.start_times import StartTimes
from qengine.scheduling.block_pool import BlockPool
from qengine.scheduling.scheduler import Scheduler, SchedulerLimits
from qengine.tokenizer import IdsOnlyTokenizer, Tokenizer, has_tokenizer, load_tokenizer, tokenizer_from_gguf
from quant_kernels.linear.dispatch import Target

logger = logging.getLogger(__name__)


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


def start_parts(config: EngineConfig, *, show_progress: bool = False, import_seconds: float = 0.0) -> EngineParts:
    """Load a model and everything that runs it, on the device that the configuration names.

    Args:
        import_seconds: what the process took before, for the table of the start.

    Raises:
        ConfigError: an option is wrong for this model or machine.
        LoadError: the model cannot be found or loaded.
    """
    watch = StartTimes(import_seconds)
    device = choose_device(config.load.device)
    opened = open_model(config.load)
    dtype = choose_dtype(config.load.dtype, device, opened.config.torch_dtype)
    platform = Platform.of(device, dtype, enforce_eager=config.enforce_eager)
    return start_on(platform, config, opened, watch, show_progress=show_progress)


def start_on(
    platform: Platform,
    config: EngineConfig,
    opened: OpenedModel,
    watch: StartTimes | None = None,
    *,
    show_progress: bool = False,
) -> EngineParts:
    """The same on a given platform.

    Raises:
        ConfigError, LoadError: as `start_parts`.
    """
    watch = watch or StartTimes()
    model_config = opened.config
    kv_format = platform.kv_format(config.cache.kv_cache_dtype)
    platform.check(model_config, config)
    plan = platform.plan(opened, config)
    watch.lap("plan")
    tokenizer = _load_tokenizer(config, opened)
    watch.lap("tokenizer")
    model, load_times = load_timed(opened, platform.target, plan.max_model_len, show_progress=show_progress)
    watch.loaded(load_times)
    plan = _corrected(plan, model.num_bytes, platform, config, opened)
    cache = KVCache(model_config, plan.num_blocks, plan.block_size, kv_format, platform.device)
    watch.lap("kv cache")
    runner = platform.make_runner(model_config, model, cache, plan, config.scheduler.max_num_seqs)
    if platform.recorder is not None:
        watch.lap("graphs")
    if not config.load.skip_check:
        _check_weights(runner, plan, config, opened)
    watch.lap("warm-up")
    _log_kernels(model.linears())
    logger.info("%s", watch.table())
    info = _info(config, opened, plan, platform.target, model.num_bytes)
    eos_token_ids = opened.eos_token_ids | tokenizer.eos_token_ids
    return EngineParts(
        info=replace(info, start_seconds=watch.seconds),
        tokenizer=tokenizer,
        scheduler=_make_scheduler(config, plan, info),
        executor=UniprocExecutor(runner),
        eos_token_ids=frozenset(i for i in eos_token_ids if i < model_config.vocab_size),
        seed=config.load.seed,
    )


def _check_weights(runner: ModelRunner, plan: MemoryPlan, config: EngineConfig, opened: OpenedModel) -> None:
    """Run the model for the first time, and refuse it if it computes no numbers.

    Raises:
        LoadError: naming the layer.
    """
    found = examine(
        runner.model,
        runner.cache,
        runner.steps,
        max_len=plan.max_model_len,
        max_rows=min(plan.max_num_batched_tokens, config.scheduler.max_num_seqs * plan.max_model_len),
    )
    if config.load.load_format == "dummy":
        found = replace(found, constant_token_id=None)
    judge(found, opened.location.name, runner.model.dtype, opened.config.torch_dtype)


def _corrected(
    plan: MemoryPlan, weight_bytes: int, platform: Platform, config: EngineConfig, opened: OpenedModel
) -> MemoryPlan:
    """The plan again where the weights turned out larger than headers could tell."""
    planned = plan.cards[0].weight_bytes
    if weight_bytes <= planned:
        return plan
    logger.warning("the weights take %s, and headers told of %s", size_text(weight_bytes), size_text(planned))
    found = platform.plan(opened, config, measured_weights=weight_bytes)
    return replace(found, max_model_len=min(found.max_model_len, plan.max_model_len))


def _load_tokenizer(config: EngineConfig, opened: OpenedModel) -> Tokenizer:
    if config.load.tokenizer is not None:
        tokenizer = load_tokenizer(config.load.tokenizer)
    elif opened.gguf_metadata is not None:
        tokenizer = tokenizer_from_gguf(opened.gguf_metadata)
    elif config.load.load_format == "dummy" and not has_tokenizer(opened.location.path):
        logger.warning("%s has no tokenizer: it takes token ids and no text", opened.location.name)
        tokenizer = IdsOnlyTokenizer(opened.location.name)
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
    target: Target,
    weight_bytes: int,
) -> EngineInfo:
    model = opened.config
    return EngineInfo(
        model=opened.location.name,
        architecture=model.architecture,
        quantization=opened.source.quantization,
        description=opened.source.description,
        dtype=str(target.dtype).removeprefix("torch."),
        device=str(target.device),
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
