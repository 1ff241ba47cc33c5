"""A memory plan as text for a terminal or an error: one column per card, one row per purpose.

Invariant: the rows of a column add up to its total. Plain text without colours, within the given width.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from qengine.config import EngineConfig
from qengine.runtime.model_bytes import ModelFacts
from qengine.runtime.planner import CardPlan, Machine, MemoryPlan, num_blocks_for, size_text

WIDTH = 100
_LABEL = 12


def plan_text(
    model: ModelFacts,
    config: EngineConfig,
    machine: Machine,
    plan: MemoryPlan,
    advice: Sequence[str],
    width: int = WIDTH,
) -> str:
    """Header, table, what it comes to, and advice."""
    parts = [_header(model, config, machine, plan), *_tables(machine, plan, width), _outcome(plan), _advice(advice)]
    lines = "\n\n".join("\n".join(part) for part in parts if part).splitlines()
    return "\n".join(piece for line in lines for piece in _wrapped(line, width))


def _wrapped(line: str, width: int) -> list[str]:
    if len(line) <= width:
        return [line]
    indent = " " * (_LABEL if line.startswith("  ") else 2)
    return textwrap.wrap(line, max(width, 30), subsequent_indent=indent, break_on_hyphens=False)


def _header(model: ModelFacts, config: EngineConfig, machine: Machine, plan: MemoryPlan) -> list[str]:
    names = [card.name for card in machine.cards]
    cards = f"{len(names)} x {names[0]}" if len(names) > 1 and len(set(names)) == 1 else " + ".join(names)
    if machine.is_shared:
        cards = f"{names[0]} in {len(names)} ranks"
    cache = config.cache.kv_cache_dtype
    steps = f"up to {plan.max_num_batched_tokens} tokens of {plan.max_num_seqs} sequences"
    return _labelled(
        ("model", f"{model.name} ({model.config.architecture}, {model.description})"),
        ("runs as", f"{machine.dtype} on {cards}; KV cache in {machine.dtype if cache == 'auto' else cache}"),
        ("step", f"{steps}; prompts that are longer are computed in parts"),
        *((("stages", _stages_text(machine, plan)),) if plan.stage_layers else ()),
    )


def _stages_text(machine: Machine, plan: MemoryPlan) -> str:
    """Which layers are where."""
    num_stages = len(plan.stage_layers)
    num_ranks = len(machine.cards) // num_stages
    what, texts = "card" if machine.is_gpu else "rank", []
    for stage in range(num_stages):
        layers, first = plan.layers_of(stage), stage * num_ranks
        assert layers is not None, "there are stages"
        texts.append(f"{_numbered('layer', layers)} on {_numbered(what, range(first, first + num_ranks))}")
    return ", ".join(texts)


def _numbered(what: str, numbers: range) -> str:
    return f"{what} {numbers[0]}" if len(numbers) == 1 else f"{what}s {numbers[0]}-{numbers[-1]}"


def _tables(machine: Machine, plan: MemoryPlan, width: int) -> list[list[str]]:
    """As many tables below each other as the width needs."""
    columns = [[_title(machine, i), *_column(card)] for i, card in enumerate(plan.cards)]
    labels = ["", *_ROWS]
    cell = max(len(text) for column in columns for text in column)
    at_once = max(1, (width - max(map(len, labels)) - 2) // (cell + 2))
    groups = [columns[first : first + at_once] for first in range(0, len(columns), at_once)]
    return [_aligned([labels, *group]) for group in groups]


def _title(machine: Machine, index: int) -> str:
    return f"card {index}" if machine.is_gpu else "memory"


_ROWS = (
    "weights",
    "step buffers",
    "CUDA graphs",
    "reserve",
    "KV cache",
    "free",
    "total",
    "KV per token",
    "KV blocks",
)
#: The rows that add up, above the total, and what follows it.
_NUM_PARTS = 6


def _column(card: CardPlan) -> list[str]:
    parts = (card.weight_bytes, card.step_buffer_bytes, card.graph_bytes, card.reserve_bytes, card.kv_bytes)
    sizes = [f"{value / 2**30:.2f} GiB" for value in (*parts, card.free_bytes, card.total_bytes)]
    return [*sizes, f"{card.kv_bytes_per_token / 2**10:.1f} KiB", f"{card.num_blocks} x {card.block_size}"]


def _aligned(columns: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in columns]
    rows = list(zip(*columns, strict=True))
    lines = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    sums = 1 + _NUM_PARTS
    return [lines[0].rstrip(), rule, *lines[1:sums], rule, lines[sums], rule, *lines[sums + 1 :]]


def _outcome(plan: MemoryPlan) -> list[str]:
    if not plan.fits:
        longest = f"{plan.max_model_len} tokens" if plan.max_model_len else "nothing: there is no room for a KV cache"
        return _labelled(("fits", f"no: a context of {plan.wanted_len} tokens does not"), ("longest", longest))
    lowered = f" (lowered from the model's {plan.wanted_len})" if plan.is_lowered else ""
    limit = f"; at most {plan.max_num_seqs} run at once" if plan.max_concurrency > plan.max_num_seqs else ""
    blocks = num_blocks_for(plan.max_model_len, plan.block_size)
    return _labelled(
        ("fits", f"yes: a context of {plan.max_model_len} tokens{lowered}, {blocks} blocks"),
        ("at once", f"{plan.longest_len} tokens: {plan.max_concurrency:.1f} sequences of that length{limit}"),
    )


def _advice(advice: Sequence[str]) -> list[str]:
    return ["What would help:", *(f"  - {line}" for line in advice)] if advice else []


def _labelled(*rows: tuple[str, str]) -> list[str]:
    return [f"  {label:<8} {text}" for label, text in rows]


def missing_text(plan: MemoryPlan, name: str) -> str:
    """Why a plan does not fit, in one line."""
    budget = size_text(min(card.kv_bytes for card in plan.cards))
    if plan.max_model_len:
        return (
            f"max_model_len is {plan.wanted_len}, but the KV cache of {budget} holds {plan.max_model_len} tokens; "
            f"use max_model_len {plan.max_model_len} or less"
        )
    short = min(plan.cards, key=lambda card: card.free_bytes)
    if short.free_bytes < 0:
        return (
            f"{name} does not fit {short.name}: {size_text(-short.free_bytes)} are missing, and there is nothing left "
            "for the KV cache"
        )
    return (
        f"{name} leaves {size_text(short.free_bytes)} of {short.name} to the KV cache, which is not enough: a block of "
        f"{plan.block_size} tokens takes {size_text(plan.block_size * short.kv_bytes_per_token)}, and "
        "kv_cache_memory_bytes must fit too"
    )
