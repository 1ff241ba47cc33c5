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
from qengine.runtime.model_bytes import ModelFacts, layers_bytes
from qengine.runtime.opening import OpenedHeaders
from qengine.runtime.planner import Card, Loaded, Machine, MemoryPlan, make_plan
from qengine.runtime.planning import fitting_plan, tell, warn_where_less_is_free


def plan_ranks(opened: OpenedHeaders, config: EngineConfig, machine: Machine) -> MemoryPlan:
    """Plan before any weight is read.

    Args:
        machine: with a card for each rank, in their order; on a CPU each of them is the computer's memory.

    Raises:
        ConfigError: if the request contradicts the model or the cards.
        DoesNotFitError: with the table, and with what would help.
    """
    plan = fitting_plan(facts_of_ranks(opened, config, machine), config, machine)
    tell(plan, config)
    return plan


def facts_of_ranks(opened: OpenedHeaders, config: EngineConfig, machine: Machine) -> ModelFacts:
    """The model, and if it is a pipeline its stages, with as many layers each as leave the most tokens.

    The embedding on the first card, head and logits on the last, and cards that are unlike leave stages unlike room.
    On a CPU all of it is in one memory, and layers are shared out evenly.

    Raises:
        ConfigError: if the request contradicts the model or the cards.
    """
    num_layers, num_stages = opened.config.num_layers, config.parallel.pipeline_parallel_size
    if num_stages == 1:
        return ModelFacts.of(opened)
    even = _in_stages(opened, stage_layers(num_layers, num_stages))
    if not machine.is_gpu:
        return even
    plan = make_plan(even, config, machine)
    rooms = _rooms(even, plan, machine)
    if min(rooms) <= 0:
        return even
    by_room = _in_stages(opened, stage_layers(num_layers, num_stages, rooms))
    return by_room if make_plan(by_room, config, machine).num_blocks > plan.num_blocks else even


def _in_stages(opened: OpenedHeaders, stages: Sequence[range]) -> ModelFacts:
    return replace(ModelFacts.of(opened), stages=tuple(ModelFacts.of(opened, layers) for layers in stages))


def _rooms(model: ModelFacts, plan: MemoryPlan, machine: Machine) -> list[int]:
    """Bytes that the cards of each stage have for layers, their weights and their caches.

    Every layer takes as much of each, so that layers in proportion to these leave room for the most tokens.
    """
    num_ranks = len(plan.cards) // len(model.stages)
    rooms = []
    for stage, facts in enumerate(model.stages):
        cards = plan.cards[stage * num_ranks : (stage + 1) * num_ranks]
        ranks = facts.split(num_ranks, plan.shares_of(stage)).ranks
        layers = sum(layers_bytes(facts, rank, machine.kernels, machine.dtype) for rank in ranks)
        rooms.append(sum(card.free_bytes + card.kv_bytes for card in cards) + layers)
    return rooms


def replan_ranks(
    plan: MemoryPlan,
    opened: OpenedHeaders,
    config: EngineConfig,
    machine: Machine,
    cards: Sequence[Card],
    weight_bytes: Sequence[int],
) -> MemoryPlan:
    """The plan again, now that every rank has seen its card and has its weights, which stay where they are: the same
    layers and shares, and never larger than before.

    Args:
        cards: as the ranks found them before they loaded.
        weight_bytes: of what each has loaded.

    Raises:
        DoesNotFitError: if too little was free.
    """
    seen = replace(machine, cards=tuple(cards))
    warn_where_less_is_free(config, seen)
    stages = [layers for stage in range(len(plan.stage_layers)) if (layers := plan.layers_of(stage)) is not None]
    loaded = Loaded(tuple(weight_bytes), plan.shares)
    found = fitting_plan(_in_stages(opened, stages), config, seen, loaded=loaded)
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
