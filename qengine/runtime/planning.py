"""The plan that an engine starts with: made before any weight is read, and refused with the table where it cannot be.

Invariant: what `plan_to_start` returns fits. It only plans; torch is not imported.
"""

from __future__ import annotations

import logging

from qengine.config import AUTO, EngineConfig
from qengine.errors import DoesNotFitError
from qengine.runtime.advice import advise
from qengine.runtime.model_bytes import ModelFacts
from qengine.runtime.plan_table import missing_text, plan_text
from qengine.runtime.planner import Loaded, Machine, MemoryPlan, make_plan

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
