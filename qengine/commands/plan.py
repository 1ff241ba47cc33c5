"""`qengine plan`: where every byte of every card would go, as a table or as JSON, without a card and without torch.

Invariant: what it says is what an engine with the same flags does, since both ask `planner.make_plan`. Exit code 0: it
fits; 1: it does not.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import Any

from qengine.commands.settings import PlanSettings
from qengine.config import AUTO
from qengine.errors import ConfigError
from qengine.logs import harmless
from qengine.runtime.advice import advise
from qengine.runtime.machine_memory import CPU, available_memory, driver_cards
from qengine.runtime.model_bytes import ModelFacts
from qengine.runtime.opening import open_model_headers
from qengine.runtime.plan_table import WIDTH, plan_text
from qengine.runtime.planner import Card, Machine, MemoryPlan, check_gpu, compute_dtype, make_plan
from qengine.runtime.rank_planning import facts_of_ranks
from quant_kernels.footprint import Kernels
from quant_kernels.native import library_file

_DOES_NOT_FIT = 1
_CARD_FIGURES = (
    "total_bytes",
    "weight_bytes",
    "step_buffer_bytes",
    "graph_bytes",
    "reserve_bytes",
    "kv_bytes",
    "kv_bytes_per_token",
    "num_blocks",
    "free_bytes",
)
_LEAST_WIDTH, _MOST_WIDTH = 40, 120


@dataclass(frozen=True, slots=True)
class Planned:
    """What was asked, what it was planned for, and what came of it."""

    settings: PlanSettings
    model: ModelFacts
    machine: Machine
    plan: MemoryPlan
    advice: tuple[str, ...]


def run(settings: PlanSettings) -> int:
    """Returns the exit code. Raises ConfigError or LoadError."""
    found = plan_model(settings)
    if settings.as_json:
        print(json.dumps(as_json(found), indent=1))
    else:
        width = min(max(_LEAST_WIDTH, shutil.get_terminal_size((WIDTH, 40)).columns), _MOST_WIDTH)
        print(harmless(plan_text(found.model, settings.engine, found.machine, found.plan, found.advice, width)))
    return 0 if found.plan.fits else _DOES_NOT_FIT


def plan_model(settings: PlanSettings) -> Planned:
    """Read the model's headers and plan it.

    Raises:
        ConfigError: if the request contradicts the model or the cards.
        LoadError: if the model cannot be loaded, as far as headers tell.
    """
    opened = open_model_headers(settings.engine.load)
    machine = _machine(settings, opened.config.torch_dtype)
    if machine.is_gpu:
        check_gpu(opened.config, settings.engine)
    model = facts_of_ranks(opened, settings.engine, machine)
    plan = make_plan(model, settings.engine, machine)
    return Planned(settings, model, machine, plan, advise(model, settings.engine, machine, plan))


def _machine(settings: PlanSettings, stored_dtype: str | None) -> Machine:
    """The cards that were named, or this computer's: its GPU if it has one, else its own memory."""
    engine = settings.engine
    cards = _named_cards(settings)
    on_gpu = cards is not None
    dtype = compute_dtype(engine.load.dtype, stored_dtype, on_gpu=on_gpu)
    if cards is None:
        cards = (Card(CPU, available_memory()),) * (settings.num_ranks or 1)
    return Machine(_kernels(dtype, on_gpu=on_gpu), cards, dtype, has_graphs=on_gpu and not engine.enforce_eager)


def _kernels(dtype: str, *, on_gpu: bool) -> Kernels:
    """The kernels that an engine would take, as far as can be told without loading them."""
    if on_gpu:
        return "gpu"
    return "native" if dtype == "bfloat16" and library_file() is not None else "cpu"


def _named_cards(settings: PlanSettings) -> tuple[Card, ...] | None:
    """One card per rank; None for the CPU."""
    if isinstance(settings.cards, tuple):
        cards = tuple(Card(*card) for card in settings.cards)
        return cards * (settings.num_ranks or 1) if len(cards) == 1 else cards
    if settings.engine.load.device == "cpu":
        return None
    found, ranks = driver_cards(), settings.num_ranks or 1
    if not found and settings.cards is None and settings.engine.load.device == AUTO:
        return None
    if len(found) < ranks:
        raise ConfigError(
            f"the driver shows {len(found)} GPU(s), and {ranks} would be needed; name a size or a card, such as "
            "--gpu 24GB or --gpu 4090, or plan for this computer's own memory with --device cpu"
        )
    return found[:ranks]


def as_json(found: Planned) -> dict[str, Any]:
    """All figures in bytes and tokens; `max_model_len` of a plan that does not fit is the longest that would, or 0."""
    model, machine, plan = found.model, found.machine, found.plan
    cache = found.settings.engine.cache.kv_cache_dtype
    num_stages = max(1, len(plan.stage_layers))
    return {
        "fits": plan.fits,
        "max_model_len": plan.max_model_len,
        "max_concurrency": plan.max_concurrency,
        "cards": [{"name": card.name} | {name: getattr(card, name) for name in _CARD_FIGURES} for card in plan.cards],
        "advice": list(found.advice),
        "model": model.name,
        "quantization": model.quantization,
        "bits": model.bits,
        "group_size": model.group_size,
        "dtype": machine.dtype,
        "kv_cache_dtype": machine.dtype if cache == AUTO else cache,
        "block_size": plan.block_size,
        "tensor_parallel_size": len(machine.cards) // num_stages,
        "pipeline_parallel_size": num_stages,
        "stage_layers": list(plan.stage_layers) or [model.config.num_layers],
        "max_num_seqs": plan.max_num_seqs,
        "max_num_batched_tokens": plan.max_num_batched_tokens,
    }
