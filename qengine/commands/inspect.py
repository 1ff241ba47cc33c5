"""`qengine inspect`: what a model would run as, and how fast memory allows it to be, without running it.

Prints a table for people or one JSON object. The answer itself is `runtime.inspection`'s; here it is given its target,
which may be a card that is not there, and laid out. On a CPU it is the target of an engine, with the same kernels.
"""

from __future__ import annotations

import json
import math
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from qengine.commands.settings import InspectSettings
from qengine.errors import ConfigError, LoadError
from qengine.logs import harmless
from qengine.runtime.inspection import CacheCost, Inspection, LinearSummary, inspect_model
from qengine.runtime.loader import open_model
from qengine.runtime.platform import choose_dtype
from quant_kernels.attention.kv_format import INT8
from quant_kernels.linear.dispatch import Target
from quant_kernels.tuning.card import KNOWN_CARDS, Card, card_of
from quant_kernels.tuning.select import Selector
from quant_kernels.tuning.table import load_table

_CUDA = torch.device("cuda")
_WIDTH = 100


def run(settings: InspectSettings) -> int:
    """Returns the exit code. Raises ConfigError or LoadError."""
    card = _card(settings)
    device = torch.device("cpu") if card is None else _CUDA
    opened = open_model(settings.load)
    dtype = choose_dtype(settings.load.dtype, device, opened.config.torch_dtype)
    bandwidth = settings.bytes_per_s if card is None else card.bytes_per_s
    found = inspect_model(
        opened,
        Target.of(device, dtype) if card is None else Target(device, dtype, _selector(card)),
        num_sequences=settings.num_sequences,
        bytes_per_s=bandwidth or None,
    )
    width = max(80, shutil.get_terminal_size((_WIDTH, 40)).columns)
    print(json.dumps(as_json(found), indent=1) if settings.as_json else harmless(as_text(found, min(width, 120))))
    return 0


def _card(settings: InspectSettings) -> Card | None:
    """The card that was named, or this machine's, with the bandwidth that was given; None for the CPU."""
    if settings.gpu is not None:
        card = KNOWN_CARDS[settings.gpu]
    elif settings.load.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' is not there: this machine has no GPU that torch can use; name one with --gpu")
    elif settings.load.device != "cpu" and torch.cuda.is_available():
        card = _with_published_figures(card_of(_CUDA))
    else:
        return None
    return card if settings.bytes_per_s is None else replace(card, bytes_per_s=settings.bytes_per_s)


def _with_published_figures(card: Card) -> Card:
    """A device does not say its bandwidth and clock; where its name is known, they are."""
    known = next((k for k in KNOWN_CARDS.values() if k.name == card.name), card)
    return replace(card, bytes_per_s=known.bytes_per_s, clock_hz=known.clock_hz)


def _selector(card: Card) -> Selector:
    try:
        return Selector(card, load_table(card))
    except ValueError as error:
        raise LoadError(f"no kernel can be chosen for {card.name}: {error}") from error


# For machines


def as_json(found: Inspection) -> dict[str, Any]:
    """All figures: bytes and microseconds of a step, shares as fractions; null is what is not known."""
    seconds = found.seconds
    return {
        "model": found.model,
        "architecture": found.architecture,
        "format": found.description,
        "dtype": found.dtype,
        "device": found.device,
        "num_layers": found.num_layers,
        "num_sequences": found.num_sequences,
        "bytes_per_s": found.bytes_per_s,
        "linears": [_linear_json(found, linear) for linear in found.linears],
        "totals": {
            "bytes_per_step": found.num_bytes,
            "bytes_per_token": found.num_bytes / found.num_sequences,
            "microseconds": None if seconds is None else seconds * 1e6,
            "tokens_per_s": found.tokens_per_s,
        },
        "kv_cache": [asdict(cost) for cost in found.cache],
    }


def _linear_json(found: Inspection, linear: LinearSummary) -> dict[str, Any]:
    seconds = found.seconds_for(linear.num_bytes)
    return {
        **asdict(linear),
        "is_slow": linear.is_slow,
        "microseconds": None if seconds is None else seconds * 1e6,
        "share": linear.num_bytes / found.num_bytes,
    }


# For people


def as_text(found: Inspection, width: int = _WIDTH) -> str:
    """Header, table, reasons and totals; reasons are wrapped at `width` columns."""
    parts = [_header(found), _table(found), _reasons(found.linears, width), _totals(found)]
    return "\n\n".join("\n".join(part) for part in parts)


def _header(found: Inspection) -> list[str]:
    bandwidth = "" if found.bytes_per_s is None else f" ({_gb_per_s(found)})"
    sequences = "1 sequence" if found.num_sequences == 1 else f"each of {found.num_sequences} sequences"
    return _labelled(
        ("model", f"{found.model} ({found.architecture}, {found.description})"),
        ("runs as", f"{found.dtype} on {found.device}{bandwidth}, {found.num_layers} layers"),
        ("step", f"one token for {sequences}; times are bytes over bandwidth, nothing is measured"),
    )


def _table(found: Inspection) -> list[str]:
    has_times = found.bytes_per_s is not None
    has_shares = any(linear.issue_share is not None for linear in found.linears)
    header = ["linear", "K -> N", "format", "kernel", "MB", "us", "share", "issue"]
    total = ["total", "", "", "", *_figures(found, found.num_bytes), ""]
    rows = [header, *(_cells(found, linear) for linear in found.linears), total]
    is_shown = [True] * 5 + [has_times, True, has_shares]
    return _aligned([[cell for cell, shown in zip(row, is_shown, strict=True) if shown] for row in rows])


def _cells(found: Inspection, linear: LinearSummary) -> list[str]:
    names = max(len(_marked(one)) for one in found.linears)
    outputs = max(len(str(one.out_features)) for one in found.linears)
    return [
        f"{_marked(linear):<{names}} x{linear.num_layers}",
        f"{linear.in_features} -> {linear.out_features:{outputs}}",
        linear.format,
        linear.kernel_text,
        *_figures(found, linear.num_bytes),
        "-" if linear.issue_share is None else f"{linear.issue_share:.0%}",
    ]


def _marked(linear: LinearSummary) -> str:
    return f"{linear.name} !" if linear.is_slow else linear.name


def _figures(found: Inspection, num_bytes: int) -> list[str]:
    """Megabytes, microseconds ("" where the bandwidth is not known) and the share of the step."""
    seconds = found.seconds_for(num_bytes)
    return [
        f"{num_bytes / 1e6:.{_digits(found.num_bytes / 1e6, 4)}f}",
        "" if seconds is None or found.seconds is None else f"{seconds * 1e6:.{_digits(found.seconds * 1e6, 4)}f}",
        "100%" if num_bytes == found.num_bytes else f"{num_bytes / found.num_bytes:.1%}",
    ]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Text on the left, figures on the right; a line below the header and above the total."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    is_text = [i < 4 and i != 1 for i in range(len(widths))]
    lines = []
    for row in rows:
        cells = [c.ljust(w) if left else c.rjust(w) for c, w, left in zip(row, widths, is_text, strict=True)]
        lines.append("  ".join(cells).rstrip())
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return [lines[0], rule, *lines[1:-1], rule, lines[-1]]


def _reasons(linears: Sequence[LinearSummary], width: int) -> list[str]:
    """Why each runs as it does; what is slow comes first and is marked."""
    slow: dict[str, list[str]] = {}
    plain: dict[str, list[str]] = {}
    for linear in linears:
        (slow if linear.is_expanded else plain).setdefault(linear.reason, []).append(linear.name)
        for text in linear.slow:
            slow.setdefault(text, []).append(linear.name)
        for text in linear.notes:
            plain.setdefault(text, []).append(linear.name)
    entries = [(" !", *entry) for entry in slow.items()] + [("  ", *entry) for entry in plain.items()]
    names = [", ".join(dict.fromkeys(named)) for _, _, named in entries]
    longest = max(len(name) for name in names)
    lines = []
    for (mark, text, _), name in zip(entries, names, strict=True):
        indent = " " * (longest + 5)
        lines += textwrap.wrap(
            f"{mark} {name:<{longest}}  {text}", width, subsequent_indent=indent, break_on_hyphens=False
        )
    return lines


def _totals(found: Inspection) -> list[str]:
    rows = [("reads", f"{_size(found.num_bytes / found.num_sequences)} of weights per token")]
    if found.seconds is not None and found.tokens_per_s is not None:
        speed = f"{_significant(found.tokens_per_s)} tok/s at most: {_significant(found.seconds * 1e3)} ms per step"
        rows.append(("bound", f"{speed} at {_gb_per_s(found)}"))
    costs = [(cost, _cache_text(cost, found.num_sequences)) for cost in found.cache]
    rows += [("KV cache" if cost is found.cache[0] else "", text) for cost, text in costs]
    if any(linear.configuration is not None for linear in found.linears):
        rows.append(("kernel", "rows x outputs of a tile, r rows of words, w warps, s stages, / shares of K"))
    if any(linear.issue_share is not None for linear in found.linears):
        rows.append(("issue", "predicted issue slots at full bandwidth; beyond 100% they are the limit, not memory"))
    return _labelled(*rows)


def _cache_text(cost: CacheCost, num_sequences: int) -> str:
    size = f"{_size(cost.bytes_per_token)} per token of context in {cost.dtype}"
    if cost.dtype == INT8.name:
        size = f"with --kv-cache-dtype {cost.dtype} it would be {_size(cost.bytes_per_token)}"
    if cost.equal_context is None:
        return f"{size}; sliding windows keep it below the weights"
    where = "" if num_sequences == 1 else " each"
    return f"{size}; as much as the weights at {cost.equal_context} tokens{where}"


def _labelled(*rows: tuple[str, str]) -> list[str]:
    return [f"  {label:<8} {text}" for label, text in rows]


def _size(num_bytes: float) -> str:
    """In the largest unit of which there is one at least; powers of 1000, as in bandwidths."""
    unit, factor = next(((u, f) for u, f in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if num_bytes >= f), ("bytes", 1.0))
    return f"{_significant(num_bytes / factor)} {unit}"


def _gb_per_s(found: Inspection) -> str:
    assert found.bytes_per_s is not None, "asked only where it is known"
    return f"{found.bytes_per_s / 1e9:g} GB/s"


def _significant(value: float) -> str:
    """Three significant digits at least, and no exponent."""
    return f"{value:.{_digits(value, 3)}f}"


def _digits(value: float, significant: int) -> int:
    """Decimals that show so many significant digits of a value above zero."""
    return max(0, significant - 1 - math.floor(math.log10(value)))
