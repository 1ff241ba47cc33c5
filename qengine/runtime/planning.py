"""The plan that an engine starts with: made before any weight is read, and refused with the table where it cannot be.

Invariant: what `plan_to_start` returns fits. It only plans; torch is not imported.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from qengine.config import AUTO, EngineConfig
from qengine.errors import DoesNotFitError
from qengine.runtime.advice import advise
from qengine.runtime.model_bytes import ModelFacts
from qengine.runtime.plan_table import missing_text, plan_text
from qengine.runtime.planner import Loaded, Machine, MemoryPlan, allowed_bytes, make_plan, size_text

logger = logging.getLogger(__name__)


def plan_to_start(
    model: ModelFacts, config: EngineConfig, machine: Machine, *, loaded: Loaded | None = None
) -> MemoryPlan:
    """Plan a model that is on one card, and say what came of it.

    Args:
        loaded: as `make_plan`.

    Raises:
        ConfigError: if the request contradicts the model or the cards.
        DoesNotFitError: with the table, and with what would help.
    """
    plan = fitting_plan(model, config, machine, loaded=loaded)
    tell(plan, config)
    if loaded is None:
        warn_where_less_is_free(config, machine)
    return plan


def fitting_plan(
    model: ModelFacts, config: EngineConfig, machine: Machine, *, loaded: Loaded | None = None
) -> MemoryPlan:
    """The same without a word in the log: for what is a part of a plan.

    Raises:
        ConfigError, DoesNotFitError: as `plan_to_start`.
    """
    plan = make_plan(model, config, machine, loaded=loaded)
    if not plan.fits:
        advice = advise(model, config, machine, plan)
        raise DoesNotFitError(missing_text(plan, model.name), plan_text(model, config, machine, plan, advice))
    return plan


def tell(plan: MemoryPlan, config: EngineConfig) -> None:
    """Log a plan, with a warning where the model's own context is lowered."""
    logger.info("memory of %s", plan.text)
    if plan.is_lowered and config.scheduler.max_model_len != AUTO:
        logger.warning(
            "max_model_len lowered from the model's %d to %d, the longest that fits "
            "(`qengine plan` shows where the memory goes)",
            plan.wanted_len,
            plan.max_model_len,
        )


def warn_where_less_is_free(config: EngineConfig, machine: Machine) -> None:
    """Log a warning for every GPU that others have taken a part of: what is free is used then, and no more."""
    for rank, card in enumerate(machine.cards if machine.is_gpu else ()):
        wanted = allowed_bytes(replace(card, free_bytes=None), config, rank)
        if card.free_bytes is not None and card.free_bytes < wanted:
            logger.warning(
                "card %d (%s) has %s free, less than the %s that %s allows: using what is free",
                rank,
                card.name,
                size_text(card.free_bytes),
                size_text(wanted),
                "gpu_memory_utilization" if config.cache.memory_limit(rank) is None else "gpu_memory_limit",
            )
