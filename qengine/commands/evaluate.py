"""`qengine evaluate`: how good a model is and how far from its original, as a table or one JSON object."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap

from qengine.commands.making import find_model
from qengine.commands.quantize_settings import DEMO
from qengine.commands.settings import EvaluateSettings
from qengine.evaluation import Evaluation, ModelFigures, evaluate

_WIDTH = 100


def run(settings: EvaluateSettings) -> int:
    """Returns the exit code. Raises QEngineError."""
    against = settings.against
    if against == DEMO:
        against = str(find_model(None).path)
    found = evaluate(
        settings.model,
        against=against,
        text=settings.text,
        window=settings.window,
        stride=settings.stride,
        max_tokens=settings.max_tokens,
        show_progress=sys.stderr.isatty(),
        **settings.options,
    )
    width = min(120, max(80, shutil.get_terminal_size((_WIDTH, 40)).columns))
    print(json.dumps(found.as_json(), indent=1) if settings.as_json else as_text(found, width))
    return 0


def as_text(found: Evaluation, width: int = _WIDTH) -> str:
    """The models, the figures and the protocol, for a terminal."""
    lines = [_head("model", found.model)]
    if found.original is not None:
        lines.append(_head("against", found.original))
    text = f"  text     {found.protocol_text()}"
    lines += textwrap.wrap(text, width, subsequent_indent=" " * 11)
    rows = found.rows()
    name_width = max(map(len, rows))
    value_width = max(len(value.partition(" ")[0]) for value in rows.values())
    lines += ["", *(f"{name:<{name_width}}  {_aligned(value, value_width)}" for name, value in rows.items()), ""]
    if found.comparison is not None:
        lines += textwrap.wrap(
            "Divergences are of the next-token distribution from the original's, in nats. ± is a standard error, the "
            "interval of the agreement is 95 %; both take tokens as independent.",
            width,
        )
    else:
        lines.append("± is a standard error that takes tokens as independent.")
    lines.append(f"{found.seconds:.1f} s")
    return "\n".join(lines)


def _head(title: str, figures: ModelFigures) -> str:
    return f"  {title:<8} {figures.name} ({figures.description}), {figures.dtype} on {figures.device}"


def _aligned(value: str, width: int) -> str:
    """The figure to the right of its column, and what explains it after that."""
    figure, _, rest = value.partition(" ")
    return f"{figure:>{width}} {rest}".rstrip()
