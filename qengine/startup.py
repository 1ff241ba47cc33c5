"""From an EngineConfig to the parts of an engine: everything that happens once, at the start.

Order: check the file's headers, plan memory, load the tokenizer, then the weights, then the KV cache, and let the model
run once. Invariant: what cannot work fails before a weight is read, with a message for the user. With several ranks
each loads its part in a process of its own. It runs no request.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from qengine.config import EngineConfig
from qengine.errors import ConfigError, EngineDeadError, LoadError
from qengine.imports import import_late
from qengine.logs import level_name
from qengine.parallel.cards import identify_cards
from qengine.parallel.peer_check import choose_route
from qengine.parallel.verdicts import Route, VerdictFile
from qengine.runtime.executors import Executor, UniprocExecutor
from qengine.runtime.links import check_split
from qengine.runtime.loader import OpenedModel, open_model, verify_files
from qengine.runtime.planner import MemoryPlan
from qengine.runtime.platform import Platform, choose_device, choose_dtype
from qengine.runtime.rank_planning import plan_ranks, replan_ranks
from qengine.runtime.start_times import StartTimes
from qengine.runtime.worker import Worker
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
    hidden_size: int
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


def start_parts(
    config: EngineConfig,
    *,
    show_progress: bool = False,
    import_seconds: float = 0.0,
    rank_command: Sequence[str] | None = None,
    route: Route | None = None,
) -> EngineParts:
    """Load a model and everything that runs it, on the device or devices that the configuration names.

    Args:
        rank_command: what a rank's process is started as, where there are several; None for what it is.
        route: how tensors go between them; None checks the cards.
        import_seconds: what the process took before, for the table of the start.

    Raises:
        ConfigError: an option is wrong for this model or machine.
        LoadError: the model cannot be found or loaded.
    """
    watch = StartTimes(import_seconds)
    device = choose_device(config.load.device)
    opened = open_model(config.load)
    verify_files(opened, config.load, show_progress=show_progress)
    dtype = choose_dtype(config.load.dtype, device, opened.config.torch_dtype)
    if config.parallel.world_size > 1:
        platform = Platform.of(device, dtype, enforce_eager=True)  # Nothing is recorded in this process.
        return _start_ranks(platform, config, opened, watch, rank_command, route, show_progress=show_progress)
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
    """The same on a given platform, in this process.

    Raises:
        ConfigError, LoadError: as `start_parts`.
    """
    watch = watch or StartTimes()
    worker = Worker(platform, config, opened)
    watch.lap("plan")
    tokenizer = model_tokenizer(config, opened)
    watch.lap("tokenizer")
    watch.loaded(worker.load(show_progress=show_progress))
    plan = worker.plan()
    worker.allocate(plan)
    watch.lap("kv cache")
    worker.warm_up(plan)
    watch.lap("warm-up")
    if worker.record_graph():
        watch.lap("graphs")
    worker.log_kernels()
    info = _info(config, opened, plan, platform.target, worker.weight_bytes)
    return _parts(info, watch, config, opened, tokenizer, UniprocExecutor(worker))


def _start_ranks(
    platform: Platform,
    config: EngineConfig,
    opened: OpenedModel,
    watch: StartTimes,
    command: Sequence[str] | None,
    route: Route | None,
    *,
    show_progress: bool,
) -> EngineParts:
    """The same in processes of their own; here are the tokenizer and the scheduler alone."""
    machine = platform.machine_of_ranks(config.parallel.world_size)
    check_split(config.parallel, opened)
    platform.check(opened.config, config)
    plan = plan_ranks(opened, config, machine)
    watch.lap("plan")
    module = import_late("qengine.runtime.spawn_executor", needed_for="several ranks")
    executor = module.SpawnExecutor(
        replace(config, load=replace(config.load, model=str(opened.location.path))),
        plan=plan,
        num_threads=max(1, torch.get_num_threads() // config.parallel.world_size),
        log_level=level_name(),
        show_progress=show_progress,
        command=command or module.RANK_COMMAND,
        route=_route(config, platform.device) if route is None else route,
    )
    try:
        tokenizer = model_tokenizer(config, opened)
        watch.lap("tokenizer")
        executor.join()
        watch.lap("ranks")
        loaded = executor.load()
        watch.loaded(*(rank.times for rank in loaded))
        cards = [rank.card for rank in loaded if rank.card is not None]
        if cards:
            plan = replan_ranks(plan, opened, config, machine, cards, [rank.weight_bytes for rank in loaded])
        executor.allocate(plan)
        watch.lap("warm-up")
    except BaseException as error:
        executor.shutdown(grace=0.0)
        if isinstance(error, EngineDeadError):
            raise LoadError(f"the model was not loaded: {error}") from error
        raise
    info = _info(config, opened, plan, platform.target, sum(rank.weight_bytes for rank in loaded))
    return _parts(info, watch, config, opened, tokenizer, executor)


def _route(config: EngineConfig, device: torch.device) -> Route:
    """How tensors go between the ranks' devices.

    CPUs have nothing to check: their memory is the host's, and a decode step's sums take a tenth of gloo's time there.
    """
    mode = config.parallel.p2p
    if device.type != "cuda":
        return Route.PEER if mode == "on" else Route.HOST_STAGED
    devices = [f"cuda:{rank}" for rank in range(config.parallel.world_size)]
    cards = identify_cards(devices)
    return choose_route(mode, cards, devices, verdicts=VerdictFile.default()).route


def _parts(
    info: EngineInfo,
    watch: StartTimes,
    config: EngineConfig,
    opened: OpenedModel,
    tokenizer: Tokenizer,
    executor: Executor,
) -> EngineParts:
    logger.info("%s", watch.table())
    eos_token_ids = opened.eos_token_ids | tokenizer.eos_token_ids
    return EngineParts(
        info=replace(info, start_seconds=watch.seconds),
        tokenizer=tokenizer,
        scheduler=_make_scheduler(config, info, executor.max_in_flight),
        executor=executor,
        eos_token_ids=frozenset(i for i in eos_token_ids if i < info.vocab_size),
        seed=config.load.seed,
    )


def model_tokenizer(config: EngineConfig, opened: OpenedModel) -> Tokenizer:
    """The tokenizer that belongs to the model, or the one that is given in its place.

    Raises:
        LoadError: there is none, it is broken, or it has more tokens than the model.
    """
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


def _make_scheduler(config: EngineConfig, info: EngineInfo, max_in_flight: int) -> Scheduler:
    limits = SchedulerLimits(
        max_num_seqs=info.max_num_seqs,
        max_num_batched_tokens=info.max_num_batched_tokens,
        max_model_len=info.max_model_len,
        max_in_flight=max_in_flight,
    )
    namespace = f"{info.model}/{info.dtype}/{config.cache.kv_cache_dtype}"
    pool = BlockPool(info.num_blocks, info.block_size, namespace=namespace)
    return Scheduler(limits, pool, enable_prefix_caching=config.cache.enable_prefix_caching)


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
        hidden_size=model.hidden_size,
        block_size=plan.block_size,
        num_blocks=plan.num_blocks,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=plan.max_num_batched_tokens,
        weight_bytes=weight_bytes,
        kv_cache_bytes=plan.kv_cache_bytes,
        default_sampling=opened.default_sampling,
    )
