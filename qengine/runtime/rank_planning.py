"""The memory plan of a model that several ranks share: one number of blocks and one context for all of them.

On GPUs each rank has a card, and each stage of a pipeline is planned with its own layers; on a CPU all ranks share one
memory, and the plan has one card for the sum of what they hold. Invariant: what comes out fits on every card, as far as
it is known what they hold. Torch is not imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qengine.config import EngineConfig
from qengine.parallel.split import stage_layers
from qengine.runtime.model_bytes import ModelFacts
from qengine.runtime.opening import OpenedHeaders
from qengine.runtime.planner import Card, Loaded, Machine, MemoryPlan
from qengine.runtime.planning import fitting_plan, tell, warn_where_less_is_free


def plan_ranks(opened: OpenedHeaders, config: EngineConfig, machine: Machine) -> MemoryPlan:
    """Plan before any weight is read.

    Args:
        machine: with a card for each rank, in their order; on a CPU each of them is the computer's memory.

    Raises:
        ConfigError: if the request contradicts the model or the cards.
        DoesNotFitError: with the table, and with what would help.
    """
    plan = _plan_stages(opened, config, machine)
    tell(plan, config)
    return plan


def _plan_stages(
    opened: OpenedHeaders, config: EngineConfig, machine: Machine, loaded: Sequence[Loaded] | None = None
) -> MemoryPlan:
    """Every stage by itself, and what all of them can hold; `loaded` by stage."""
    if not machine.is_gpu:
        return fitting_plan(_facts_of_all(opened, config), config, machine)
    tp, layers = config.parallel.tensor_parallel_size, opened.config.num_layers
    plans = []
    for stage, own in enumerate(stage_layers(layers, config.parallel.pipeline_parallel_size)):
        ranks = slice(stage * tp, (stage + 1) * tp)
        facts, cards = ModelFacts.of(opened, own), replace(machine, cards=machine.cards[ranks], first_card=stage * tp)
        in_place = None if loaded is None else loaded[stage]
        plans.append(fitting_plan(facts, _limited(config, ranks), cards, loaded=in_place))
    return common_plan(plans)


def _facts_of_all(opened: OpenedHeaders, config: EngineConfig) -> ModelFacts:
    """The whole model, and its stages if it is a pipeline."""
    whole, num_stages = ModelFacts.of(opened), config.parallel.pipeline_parallel_size
    if num_stages == 1:
        return whole
    stages = stage_layers(opened.config.num_layers, num_stages)
    return replace(whole, stages=tuple(ModelFacts.of(opened, layers) for layers in stages))


def replan_ranks(
    plan: MemoryPlan,
    opened: OpenedHeaders,
    config: EngineConfig,
    machine: Machine,
    cards: Sequence[Card],
    weight_bytes: Sequence[int],
) -> MemoryPlan:
    """The plan again, now that every rank has seen its card and has its weights, which stay where they are: the same
    shares, and never larger than before.

    Args:
        cards: as the ranks found them before they loaded.
        weight_bytes: of what each has loaded.

    Raises:
        DoesNotFitError: if too little was free.
    """
    tp = config.parallel.tensor_parallel_size
    stages = range(config.parallel.pipeline_parallel_size)
    loaded = [Loaded(tuple(weight_bytes[stage * tp : (stage + 1) * tp]), plan.shares_of(stage)) for stage in stages]
    seen = replace(machine, cards=tuple(cards))
    warn_where_less_is_free(config, seen)
    found = _plan_stages(opened, config, seen, loaded)
    num_blocks = min(plan.num_blocks, found.num_blocks)
    smaller = replace(
        found,
        num_blocks=num_blocks,
        max_model_len=min(plan.max_model_len, found.max_model_len),
        cards=tuple(replace(card, num_blocks=num_blocks) for card in found.cards),
    )
    if smaller.max_model_len < plan.max_model_len:
        tell(smaller, config)
    return smaller


def _limited(config: EngineConfig, ranks: slice) -> EngineConfig:
    """The configuration of some of the ranks, which has the limits of their cards alone."""
    limits = config.cache.gpu_memory_limit
    if not isinstance(limits, tuple):
        return config
    config.cache.check_num_limits(config.parallel.world_size)
    return replace(config, cache=replace(config.cache, gpu_memory_limit=limits[ranks]))


def common_plan(plans: Sequence[MemoryPlan]) -> MemoryPlan:
    """What every stage can hold, from what each could; the cards of all."""
    num_blocks = min(plan.num_blocks for plan in plans)
    cards = [replace(card, num_blocks=num_blocks) for plan in plans for card in plan.cards]
    return replace(
        plans[0],
        num_blocks=num_blocks,
        shares=tuple(plan.shares_of(0) for plan in plans) if any(plan.shares for plan in plans) else (),
        max_model_len=min(plan.max_model_len for plan in plans),
        cards=tuple(cards),
    )
