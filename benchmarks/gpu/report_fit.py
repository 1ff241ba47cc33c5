"""Models in the memory of smaller cards as text: each rank's peak against its plan."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.gpu.fit import faults
from benchmarks.gpu.tables import Record, gib, table


def section(records: Sequence[Record]) -> str:
    """A line per rank."""
    header = ["model", "rank", "sequences", "context", "GiB allowed", "GiB planned", "GiB at most", "of plan",
              "GiB while loading", "decode tokens/s", ""]  # fmt: skip
    lines = [
        [r["model"], f"{r['rank']} of {r['ranks']}", str(r["sequences"]), str(r["context"]), gib(r["memory_limit"]),
         gib(r["planned_bytes"]), gib(r["peak_reserved"]), _of_plan(r), gib(r["peak_loading"]),
         "-" if r["decode_tokens_per_s"] is None else f"{r['decode_tokens_per_s']:.1f}", _verdict(r)]
        for r in records
    ]  # fmt: skip
    if not lines:
        return ""
    note = (
        "Memory is torch's, without the driver's own. Two ranks share this one card and hand each other tensors "
        "through host memory, so their tokens per second are not those of two cards."
    )
    return f"## Memory against the plan\n\n{table(header, lines, text=('model', 'rank', ''))}\n\n{note}"


def _of_plan(record: Record) -> str:
    peak = record["peak_reserved"]
    return "-" if peak is None else f"{peak / record['planned_bytes']:.1%}"


def _verdict(record: Record) -> str:
    if record["peak_reserved"] is None:
        return "not measured"
    return "OFF THE PLAN" if faults(record) else "ok"
