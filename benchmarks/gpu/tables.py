"""Markdown tables, and figures as people read them. Text in, text out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]


def table(header: Sequence[str], lines: Sequence[Sequence[str]], text: Collection[str]) -> str:
    """A table whose columns are numbers, except those named in `text`."""
    rule = ["---" if name in text else "---:" for name in header]
    return "\n".join(_row(cells) for cells in (header, rule, *lines))


def share(part: float | None, whole: float | None = 1.0) -> str:
    """A percentage, or a dash where there is no figure."""
    return "-" if part is None or not whole else f"{part / whole:.0%}"


def gib(num_bytes: float | None) -> str:
    """Bytes in GiB, or a dash."""
    return "-" if num_bytes is None else f"{num_bytes / 2**30:.1f}"


def verdict(reached: bool) -> str:
    """How an aim is called that is, or is not, reached."""
    return "reached" if reached else "MISSED"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
