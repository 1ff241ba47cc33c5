"""MemoryPlan: where every byte of every card goes, decided before any of them is allocated.

`make_plan` is the one function that both `qengine plan` and the engine use. Invariant: on each card total = weights +
step buffers + graphs + reserve + KV cache + free, and a sequence of exactly `max_model_len` tokens fits the planned
pool. It imports no torch and reads no weights; `advice` says what would help where a plan does not fit.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from qengine.config import AUTO, CacheConfig, EngineConfig, ModelConfig
from qengine.errors import ConfigError
from qengine.parallel.seats import chain, shared_bytes
from qengine.parallel.split import RankShape
from qengine.runtime.model_bytes import (
    BATCHED_TOKENS,
    CPU_BATCHED_TOKENS,
    LARGE_BATCHED_TOKENS,
    LARGE_CARD_BYTES,
    ModelFacts,
    graph_bytes,
    native_room_bytes,
    rounding_bytes,
    step_bytes,
    weight_parts,
)
from quant_kernels.footprint import Kernels, kv_bytes_per_token, kv_number_bytes
from quant_kernels.tuning.attention import BLOCK_SIZES, HEAD_DIMS, max_group

#: On a CPU the cache holds this many sequences of full length by default, but at most this share of free memory.
CPU_SEQUENCES = 4
CPU_SHARE = 0.25
#: The driver's own memory per process: code, stacks, libraries.
CONTEXT_BYTES = 2**29
#: What Python and torch take of a computer's memory for each of several ranks and do not share: 148 MiB were measured
#: after the imports and a first product.
RANK_BYTES = 192 * 2**20
#: Shares that are tried where cards are unlike.
_SHARE_STEPS = 16


#: How much of a model each rank takes, in any unit; None for alike.
Shares = tuple[float, ...] | None


@dataclass(frozen=True, slots=True)
class Card:
    """A card that need not be there, or a computer's own memory.

    Attributes:
        total_bytes: as its driver says.
        free_bytes: what this process can have of it; None for all.
    """

    name: str
    total_bytes: int
    free_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Machine:
    """What a model is planned for: one card per rank. On a CPU it is the same memory for all of them.

    Attributes:
        kernels: "gpu"; or "cpu" (torch's) and "native" (our own) with the computer's memory as the only card.
        dtype: compute dtype.
        has_graphs: decode steps are recorded, if the model is on one card.
        is_interpreted: a GPU's kernels run in Triton's interpreter, in the computer's memory.
        num_threads: that our own kernels for a CPU may run on, each with room of its own.
    """

    kernels: Kernels
    cards: tuple[Card, ...]
    dtype: str
    has_graphs: bool = True
    is_interpreted: bool = False
    num_threads: int = field(default_factory=lambda: os.cpu_count() or 1)

    @property
    def is_gpu(self) -> bool:
        """Whether the memory is a card's own."""
        return self.kernels == "gpu" and not self.is_interpreted

    @property
    def is_shared(self) -> bool:
        """Whether several ranks have one memory, which is then planned as one card for the sum of them."""
        return not self.is_gpu and len(self.cards) > 1

    @property
    def records_steps(self) -> bool:
        """Whether there are graphs that take memory. Steps that wait for other ranks are not recorded."""
        return self.has_graphs and self.is_gpu and len(self.cards) == 1


@dataclass(frozen=True, slots=True)
class Loaded:
    """Weights that are in their places.

    Attributes:
        weight_bytes: of each rank, as they were measured.
        shares: by which the ranks of each stage loaded them; none where all are alike.
    """

    weight_bytes: tuple[int, ...]
    shares: tuple[Shares, ...] = ()

    def of_stage(self, stage: int, ranks: slice) -> Loaded:
        """Those of one stage's ranks."""
        return Loaded(self.weight_bytes[ranks], self.shares[stage : stage + 1])


@dataclass(frozen=True, slots=True)
class CardPlan:
    """Bytes of one card by purpose; `free_bytes` is negative where something does not fit.

    Attributes:
        weight_bytes: as they are once prepared, padding included.
        step_buffer_bytes: what a step takes at most.
        graph_bytes: recorded decode steps.
        reserve_bytes: what this process may not use, the driver's own, and what torch's allocator rounds up.
        kv_bytes_per_token: of context, all layers together.
        num_blocks: of the cache.
    """

    name: str
    total_bytes: int
    weight_bytes: int
    step_buffer_bytes: int
    graph_bytes: int
    reserve_bytes: int
    kv_bytes_per_token: int
    num_blocks: int
    block_size: int

    @property
    def kv_bytes(self) -> int:
        return self.num_blocks * self.block_size * self.kv_bytes_per_token

    @property
    def free_bytes(self) -> int:
        """What nobody takes."""
        taken = self.weight_bytes + self.step_buffer_bytes + self.graph_bytes + self.reserve_bytes
        return self.total_bytes - taken - self.kv_bytes


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Sizes an engine is built with.

    Attributes:
        max_model_len: the context, prompt and output together; where it does not fit, the longest that would, or 0.
        wanted_len: the context that was asked for, or the model's own.
        fits: whether the engine can start with it.
        num_blocks: of `block_size` tokens, on every card.
        cards: by rank.
        shares: how the ranks of each stage share its layers where they are unlike; none where all are alike.
        stage_layers: how many layers each stage of a pipeline has; none where there is one stage.
    """

    max_model_len: int
    wanted_len: int
    fits: bool
    max_num_batched_tokens: int
    max_num_seqs: int
    block_size: int
    num_blocks: int
    cards: tuple[CardPlan, ...]
    shares: tuple[Shares, ...] = ()
    stage_layers: tuple[int, ...] = ()

    def layers_of(self, stage: int) -> range | None:
        """The layers of one stage; None for all."""
        if not self.stage_layers:
            return None
        first = sum(self.stage_layers[:stage])
        return range(first, first + self.stage_layers[stage])

    def shares_of(self, stage: int) -> Shares:
        """How the ranks of one stage share its layers."""
        return self.shares[stage] if self.shares else None

    @property
    def kv_cache_bytes(self) -> int:
        """Of all cards."""
        return sum(card.kv_bytes for card in self.cards)

    @property
    def kv_bytes_per_token(self) -> int:
        """Of all cards."""
        return sum(card.kv_bytes_per_token for card in self.cards)

    @property
    def longest_len(self) -> int:
        """Tokens that the pool holds; one sequence can have them all, if the model was made for so many."""
        return self.num_blocks * self.block_size

    @property
    def max_concurrency(self) -> float:
        """Sequences of `max_model_len` tokens that the pool holds at once; `max_num_seqs` may allow fewer."""
        if self.max_model_len == 0:
            return 0.0
        return self.num_blocks / num_blocks_for(self.max_model_len, self.block_size)

    @property
    def is_lowered(self) -> bool:
        """Whether it fits with a shorter context than the model was made for."""
        return self.fits and self.max_model_len < self.wanted_len

    @property
    def text(self) -> str:
        """One line per card, for the log."""
        return "; ".join(_card_text(card) for card in self.cards)


def _card_text(card: CardPlan) -> str:
    parts = {
        "weights": card.weight_bytes,
        "a step": card.step_buffer_bytes,
        "graphs": card.graph_bytes,
        "reserve": card.reserve_bytes,
        "the KV cache": card.kv_bytes,
    }
    named = ", ".join(f"{size_text(value)} for {name}" for name, value in parts.items())
    return f"{card.name}: {size_text(card.total_bytes)} = {named}, {size_text(card.free_bytes)} free"


def num_blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that so many tokens take."""
    return -(-tokens // block_size)


def size_text(num_bytes: int) -> str:
    """Bytes for people."""
    sign, size = "-" if num_bytes < 0 else "", abs(num_bytes)
    return f"{sign}{size / 2**30:.2f} GiB" if size >= 2**30 else f"{sign}{size / 2**20:.1f} MiB"


def compute_dtype(name: str, stored: str | None, *, on_gpu: bool) -> str:
    """The compute dtype by the user's name for it.

    "auto" on a CPU is bfloat16 for every file, since its 4-bit kernel knows nothing else; on a GPU what the file is
    stored in, float16 for anything but bfloat16.

    Args:
        stored: the file's own dtype, if it says.

    Raises:
        ConfigError: for a dtype that the device has no kernels for.
    """
    if name == AUTO:
        return "bfloat16" if not on_gpu or stored == "bfloat16" else "float16"
    if name == "float32" and on_gpu:
        raise ConfigError("dtype is float32, which has no kernels on a GPU; use float16, bfloat16 or --device cpu")
    return name


def check_gpu(model: ModelConfig, config: EngineConfig, arch: int = 0) -> None:
    """Refuse what a GPU's kernels do not know.

    Args:
        arch: compute capability, such as 86; 0 if it is not known.

    Raises:
        ConfigError: naming the option or the model's property.
    """
    if config.cache.block_size not in BLOCK_SIZES:
        known = " or ".join(map(str, BLOCK_SIZES))
        raise ConfigError(f"block_size is {config.cache.block_size}, but a GPU's attention takes {known}")
    group, most = model.num_heads // model.num_kv_heads, max_group(arch, model.head_dim)
    if group > most or model.head_dim > HEAD_DIMS[-1]:
        raise ConfigError(
            f"the model has {group} query heads per KV head of {model.head_dim} numbers; the GPU's attention takes "
            f"up to {most} heads of up to {HEAD_DIMS[-1]}; use --device cpu"
        )


def wanted_length(model: ModelConfig, asked: int | str | None) -> int:
    """The context that is asked for; the model's own where nothing is.

    Raises:
        ConfigError: if the model was not made for so much.
    """
    if asked is None or asked == AUTO:
        return model.max_position
    assert isinstance(asked, int), "config checks max_model_len"
    if asked > model.max_position:
        raise ConfigError(
            f"max_model_len is {asked}, but the model was made for at most {model.max_position} positions; "
            f"use {model.max_position} or less"
        )
    return asked


def allowed_bytes(card: Card, config: EngineConfig, rank: int) -> int:
    """What this process may take of a card: the limit, else the share, and never more than is free.

    Raises:
        ConfigError: if the limit exceeds the card.
    """
    limit = config.cache.memory_limit(rank)
    if limit is None:
        allowed = int(card.total_bytes * config.cache.gpu_memory_utilization)
    elif limit > card.total_bytes:
        raise ConfigError(
            f"gpu_memory_limit is {size_text(limit)}, but {card.name} has {size_text(card.total_bytes)}; lower it"
        )
    else:
        allowed = limit
    return allowed if card.free_bytes is None else min(allowed, card.free_bytes)


def batched_tokens(config: EngineConfig, machine: Machine) -> int:
    """Tokens of one step: as asked for, else by the device and its size."""
    if config.scheduler.max_num_batched_tokens is not None:
        return config.scheduler.max_num_batched_tokens
    if not machine.is_gpu:
        return CPU_BATCHED_TOKENS
    smallest = min(card.total_bytes for card in machine.cards)
    return LARGE_BATCHED_TOKENS if smallest >= LARGE_CARD_BYTES else BATCHED_TOKENS


def make_plan(model: ModelFacts, config: EngineConfig, machine: Machine, *, loaded: Loaded | None = None) -> MemoryPlan:
    """Share out the memory of every card. Whether the result `fits` is for the caller to look at.

    Args:
        model: with its stages, if it is a pipeline; the ranks of one are neighbours among the cards.
        loaded: where the weights are in their places already; None takes what headers tell, and the best shares.

    Raises:
        ConfigError: if the request contradicts the model or the cards, whatever their memory.
    """
    if machine.is_gpu:
        config.cache.check_num_limits(len(machine.cards))
        if model.stages:
            return _plan_stages(model.stages, config, machine, loaded)
    wanted = wanted_length(model.config, config.scheduler.max_model_len)
    planner = _Planner(model, config, machine, loaded)
    loads = planner.loads()
    best, load = max(((planner.plan(wanted, load), load) for load in loads), key=lambda found: found[0].num_blocks)
    if best.longest_len >= wanted:
        return best
    is_explicit = isinstance(config.scheduler.max_model_len, int)
    longest = planner.plan(planner.longest(wanted, load), load)
    return replace(longest, wanted_len=wanted, fits=longest.max_model_len > 0 and not is_explicit)


def _plan_stages(
    stages: Sequence[ModelFacts], config: EngineConfig, machine: Machine, loaded: Loaded | None
) -> MemoryPlan:
    """Every stage by itself, on its own cards, and what all of them can hold."""
    num_ranks = len(machine.cards) // len(stages)
    # What passes through one stage passes through all.
    limits = replace(config.scheduler, max_num_batched_tokens=batched_tokens(config, machine))
    plans = []
    for stage, model in enumerate(stages):
        ranks = slice(stage * num_ranks, (stage + 1) * num_ranks)
        own = replace(config, scheduler=limits, cache=_cache_of(config, ranks))
        cards = replace(machine, cards=machine.cards[ranks], has_graphs=False)
        in_place = None if loaded is None else loaded.of_stage(stage, ranks)
        plans.append(make_plan(model, own, cards, loaded=in_place))
    num_blocks = min(plan.num_blocks for plan in plans)
    return replace(
        plans[0],
        num_blocks=num_blocks,
        max_model_len=min(plan.max_model_len for plan in plans),
        fits=all(plan.fits for plan in plans),
        cards=tuple(replace(card, num_blocks=num_blocks) for plan in plans for card in plan.cards),
        shares=tuple(plan.shares_of(0) for plan in plans) if any(plan.shares for plan in plans) else (),
        stage_layers=tuple(model.config.num_layers for model in stages),
    )


def _cache_of(config: EngineConfig, ranks: slice) -> CacheConfig:
    """Settings of the cache on some of the cards, with the limits of these alone."""
    limits = config.cache.gpu_memory_limit
    return replace(config.cache, gpu_memory_limit=limits[ranks]) if isinstance(limits, tuple) else config.cache


def _summed(ranks: Sequence[CardPlan], shared_bytes: int) -> CardPlan:
    """One memory with all that its ranks hold, and what they share."""
    return replace(
        ranks[0],
        weight_bytes=sum(rank.weight_bytes for rank in ranks),
        step_buffer_bytes=sum(rank.step_buffer_bytes for rank in ranks),
        reserve_bytes=len(ranks) * RANK_BYTES + shared_bytes,
        kv_bytes_per_token=sum(rank.kv_bytes_per_token for rank in ranks),
    )


def seats_bytes(tensor_parallel_size: int, num_stages: int, config: EngineConfig) -> int:
    """Memory by which the ranks on a CPU reach each other: within every stage, and between the stages at each place."""
    if config.parallel.p2p == "on":
        return 0  # By gloo, through sockets.
    pipe = shared_bytes(num_stages, chain(num_stages))
    return num_stages * shared_bytes(tensor_parallel_size) + tensor_parallel_size * pipe


@dataclass(frozen=True, slots=True)
class _Load:
    """What the cards carry whatever the context is.

    Attributes:
        ranks: what each of them owns.
        weights, rounding: bytes of its weights, and what torch's allocator adds to them.
    """

    shares: Shares
    ranks: tuple[RankShape, ...]
    weights: tuple[int, ...]
    rounding: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Planner:
    """One request; plans it for a context and given shares of the cards."""

    model: ModelFacts
    config: EngineConfig
    machine: Machine
    loaded: Loaded | None

    @property
    def _stages(self) -> tuple[ModelFacts, ...]:
        """Those whose ranks are among the cards."""
        return self.model.stages or (self.model,)

    @property
    def _tp(self) -> int:
        return len(self.machine.cards) // len(self._stages)

    def loads(self) -> list[_Load]:
        """The model, shared out in every way that is worth a look; most shares come to the same ranks."""
        splits: dict[tuple[RankShape, ...], Shares] = {}
        for shares in self._shares():
            splits.setdefault(self.model.split(self._tp, shares).ranks, shares)
        return [self._load(shares, ranks) for ranks, shares in splits.items()]

    def _load(self, shares: Shares, ranks: tuple[RankShape, ...]) -> _Load:
        machine = self.machine
        parts = [
            list(weight_parts(stage, rank, machine.kernels, machine.dtype)) for stage in self._stages for rank in ranks
        ]
        weights: Sequence[int] = [sum(size * count for size, count in sizes) for sizes in parts]
        if self.loaded is not None:
            weights = self.loaded.weight_bytes
        rounding = [rounding_bytes(sizes) if machine.is_gpu else 0 for sizes in parts]
        return _Load(shares, ranks, tuple(weights), tuple(rounding))

    def longest(self, wanted: int, load: _Load) -> int:
        """The longest context below `wanted` that fits: a longer one needs larger tables and leaves fewer blocks."""
        fitting, failing = 0, wanted
        while failing - fitting > 1:
            middle = (fitting + failing) // 2
            if self.plan(middle, load).longest_len >= middle:
                fitting = middle
            else:
                failing = middle
        return fitting

    def _shares(self) -> list[Shares]:
        """How the model may be shared out: evenly, or where cards are unlike, more and more by their sizes."""
        if self.loaded is not None:
            return list(self.loaded.shares) or [None]
        if not self.machine.is_gpu or len(self.machine.cards) == 1:
            return [None]
        allowed = [allowed_bytes(card, self.config, rank) for rank, card in enumerate(self.machine.cards)]
        if len(set(allowed)) == 1:
            return [None]
        even = sum(allowed) / len(allowed)
        # Beyond sizes alone: every card has the same fixed costs, so the smaller one carries even less.
        steps = (i / _SHARE_STEPS for i in range(1, 2 * _SHARE_STEPS + 1))
        blends = (tuple(even + step * (size - even) for size in allowed) for step in steps)
        return [None, *(blend for blend in blends if min(blend) > 0)]

    def plan(self, length: int, load: _Load) -> MemoryPlan:
        """The cards as they are with a context of `length` tokens, which may turn out not to fit."""
        cards = [self._fixed(load, rank, length) for rank in range(len(self.machine.cards))]
        if self.machine.is_shared:
            cards = [_summed(cards, seats_bytes(self._tp, len(self._stages), self.config))]
        num_blocks = max(0, min(self._most_blocks(card, length) for card in cards))
        return MemoryPlan(
            max_model_len=length,
            wanted_len=length,
            fits=True,
            max_num_batched_tokens=batched_tokens(self.config, self.machine),
            max_num_seqs=self.config.scheduler.max_num_seqs,
            block_size=self.config.cache.block_size,
            num_blocks=num_blocks,
            cards=tuple(replace(card, num_blocks=num_blocks) for card in cards),
            shares=() if load.shares is None else (load.shares,),
            stage_layers=tuple(stage.config.num_layers for stage in self.model.stages),
        )

    def _fixed(self, load: _Load, rank: int, length: int) -> CardPlan:
        """A card with all but its cache."""
        machine, limits, block_size = self.machine, self.config.scheduler, self.config.cache.block_size
        stage, place = divmod(rank, self._tp)
        model = self._stages[stage]
        card, local = machine.cards[rank], load.ranks[place].local(model.config)
        rows = batched_tokens(self.config, machine)
        graphs = reserve = room = 0
        if machine.is_gpu:
            reserve = card.total_bytes - allowed_bytes(card, self.config, rank) + CONTEXT_BYTES + load.rounding[rank]
        if machine.kernels == "native":
            most_rows = max(rows, limits.max_num_seqs)
            room = native_room_bytes(model, load.ranks[place], most_rows, machine.num_threads)
        if machine.records_steps:
            graphs = graph_bytes(local, limits.max_num_seqs, length, block_size)
        number, scale = kv_number_bytes(self.config.cache.kv_cache_dtype, machine.dtype)
        return CardPlan(
            name=card.name,
            total_bytes=card.total_bytes,
            weight_bytes=load.weights[rank],
            step_buffer_bytes=room
            + step_bytes(
                local,
                rows,
                limits.max_num_seqs,
                length,
                kv_number_bytes=number,
                num_ranks=self._tp,
                has_head=model.has_head,
                on_gpu=machine.is_gpu,
            ),
            graph_bytes=graphs,
            reserve_bytes=reserve,
            kv_bytes_per_token=local.num_layers * kv_bytes_per_token(local.num_kv_heads, local.head_dim, number, scale),
            num_blocks=0,
            block_size=block_size,
        )

    def _most_blocks(self, card: CardPlan, length: int) -> int:
        """Blocks that a card can hold: the size that was asked for if it fits, else what the device's rule gives."""
        block_bytes = card.kv_bytes_per_token * card.block_size
        asked = self.config.cache.kv_cache_memory_bytes
        if asked is not None:
            return asked // block_bytes if asked <= card.free_bytes else 0
        if self.machine.is_gpu:
            return card.free_bytes // block_bytes
        budget = min(int(card.total_bytes * CPU_SHARE), card.free_bytes)
        return min(budget // block_bytes, CPU_SEQUENCES * num_blocks_for(length, card.block_size))
