"""Results as text: the aligned table, the README's markdown, and how far each figure is from the machine's bound.

Works on the results record alone (the JSON file's content), so an old file prints as a new one does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import InputError, Workload, read_results

SCHEMA = 1
BENCHMARK = "offline-cpu"
MEASURED = "measured"
OWN = "qengine"
#: Above this share of the cores' time taken by others, figures are not to be trusted.
DISTURBED_SHARE = 0.10

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Metric:
    """One row. `key` names it in the results; for seconds and bytes less is better."""

    key: str
    label: str
    unit: str
    more_is_better: bool
    meaning: str
    scale: float = 1.0

    def show(self, value: float) -> str:
        value /= self.scale
        digits = 2 if value < 10 else 1 if value < 100 else 0
        return f"{value:.{digits}f}"


def metrics_of(workload: Record) -> list[Metric]:
    """The rows of a results record, in order."""
    shape = f"{workload['decode_prompt_tokens']} prompt tokens each; {workload['decode_tokens']} steps timed"
    decode = [
        Metric(
            f"decode_{b}",
            f"decode, {b} sequence{'s' if b > 1 else ''}",
            "tok/s",
            True,
            f"tokens generated per second, all sequences together; {shape}, each giving every sequence one token",
        )
        for b in workload["batches"]
    ]
    start = (
        f"wall clock from spawning a fresh process to its first output; files in the page cache, a short text prompt, "
        f"context {workload['context_tokens']}"
    )
    return [
        *decode,
        Metric(
            "prompt",
            f"prompt, {workload['prompt_tokens']} tokens",
            "tok/s",
            True,
            "prompt tokens processed per second, one sequence of random tokens",
        ),
        Metric("first_token", "start to first token", "s", False, start),
        Metric(
            "peak_memory",
            "peak memory",
            "MiB",
            False,
            "largest resident memory (mapped files included) of the process of the start test; in bytes",
            2**20,
        ),
    ]


def check_results(record: Any) -> Record:
    """The record itself, if it is a results record of this version.

    Raises:
        InputError: saying what is missing.
    """
    if not isinstance(record, Mapping) or record.get("benchmark") != BENCHMARK or record.get("schema") != SCHEMA:
        raise InputError(f"not a results file of this benchmark: expected benchmark '{BENCHMARK}', schema {SCHEMA}")
    missing = [k for k in ("environment", "model", "workload", "bound", "disturbance", "engines") if k not in record]
    if missing:
        raise InputError(f"the results file lacks {', '.join(missing)}; measure again")
    return record


def load_results(path: Path) -> Record:
    """Read a results file.

    Raises:
        InputError: if it cannot be read or is no results file of this version.
    """
    return read_results(path, check_results)


def times_better(metric: Metric, own: float, other: float) -> float:
    """How many times better ours is: ours / theirs for speeds, theirs / ours for seconds and bytes."""
    return own / other if metric.more_is_better else other / own


def measured_engines(results: Record) -> list[dict[str, Any]]:
    return [e for e in results["engines"] if e["status"] == MEASURED]


def bounds_of(engine: Record, results: Record) -> dict[str, dict[str, float]]:
    """Distance of one engine to the machine's bound, from its median speeds.

    Returns:
        "decode" (where the bytes per token are known): bytes_per_token, gb_per_s, share of read bandwidth;
        "prompt": gflop_per_s, share of the matmul rate. Attention's own arithmetic is not counted.
    """
    workload, model, bound = results["workload"], results["model"], results["bound"]
    found: dict[str, dict[str, float]] = {}
    if engine["weight_bytes_per_token"] is not None and 1 in workload["batches"]:
        kv_bytes = engine["kv_bytes_per_token"] * Workload.from_json(workload).mean_decode_context
        num_bytes = engine["weight_bytes_per_token"] + kv_bytes
        rate = num_bytes * engine["results"]["decode_1"]["median"]
        found["decode"] = {
            "bytes_per_token": num_bytes,
            "kv_bytes_per_token": kv_bytes,
            "gb_per_s": rate / 1e9,
            "share": rate / bound["read_bytes_per_s"],
        }
    tokens = workload["prompt_tokens"]
    # Two operations per weight and token; only the last token passes the head.
    flops = 2 * (model["layer_params"] * tokens + model["head_params"])
    rate = flops * engine["results"]["prompt"]["median"] / tokens
    found["prompt"] = {"gflop": flops / 1e9, "gflop_per_s": rate / 1e9, "share": rate / best_matmul(bound)[1]}
    return found


def best_matmul(bound: Record) -> tuple[str, float]:
    """The dtype that multiplies fastest here, and its rate in operations per second."""
    rates: Mapping[str, float] = bound["matmul_flop_per_s"]
    return max(rates.items(), key=lambda item: item[1])


def terminal_report(results: Record) -> str:
    """Everything a person wants to see after a run."""
    parts = [_title(results), aligned(_table(results, _with_range))]
    parts += [_bounds_text(results), *_notes(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_report(results: Record) -> str:
    """The README's table, with the machine and the command that makes it."""
    header, *rows = _table(results, _plain)
    lines = [_markdown_row(header), _markdown_row(["---", *["---:"] * (len(header) - 1)])]
    lines += [_markdown_row(row) for row in rows]
    environment = results["environment"]
    note = (
        f"{_title(results)}; {environment['cpu']}, {environment['date'][:10]}. "
        f"Ratios above 1.00x mean that {OWN} is better. `{environment['command']}`"
    )
    remarks = [f"- {line}" for line in (*_missing(results), _warning(results)) if line]
    return "\n".join([*lines, "", note, *(["", *remarks] if remarks else [])]) + "\n"


def caption(results: Record) -> str:
    """The model in words."""
    model = results["model"]
    return f"{model['name']} ({model['description']}) on the CPU"


def _title(results: Record) -> str:
    workload = results["workload"]
    runs = workload["runs"]
    median = f"median of {runs} runs" if runs > 1 else "one run"
    threads = f"{workload['threads']} thread{'s' if workload['threads'] > 1 else ''}"
    return f"{caption(results)}, {threads}, {median}"


Cell = Callable[[Metric, Mapping[str, float]], str]


def _plain(metric: Metric, spread: Mapping[str, float]) -> str:
    return f"{metric.show(spread['median'])} {metric.unit}"


def _with_range(metric: Metric, spread: Mapping[str, float]) -> str:
    if len(spread.get("values", ())) < 2:  # type: ignore[arg-type]
        return metric.show(spread["median"])
    return f"{metric.show(spread['median'])} ({metric.show(spread['min'])}-{metric.show(spread['max'])})"


def _table(results: Record, cell: Cell) -> list[list[str]]:
    """Header and rows: metric, then every engine, each peer followed by our ratio to it."""
    own, *peers = measured_engines(results)
    show_units = cell is _with_range
    header = ["", *(["unit"] if show_units else []), own["name"]]
    for peer in peers:
        header += [peer["label"], "ratio"]
    rows = [header]
    for metric in metrics_of(results["workload"]):
        spread = own["results"][metric.key]
        row = [metric.label, *([metric.unit] if show_units else []), cell(metric, spread)]
        for peer in peers:
            theirs = peer["results"][metric.key]
            row += [cell(metric, theirs), f"{times_better(metric, spread['median'], theirs['median']):.2f}x"]
        rows.append(row)
    return rows


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns two spaces apart; labels and units to the left, figures to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        cells = [text.ljust(w) if i < 2 else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
        if number == 0:
            lines.append("-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(lines)


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _bounds_text(results: Record) -> str:
    bound = results["bound"]
    dtype, rate = best_matmul(bound)
    head = (
        f"Distance to the bound: this machine reads {bound['read_bytes_per_s'] / 1e9:.1f} GB/s "
        f"and multiplies {rate / 1e9:.0f} GFLOP/s ({dtype})"
    )
    rows: list[list[str]] = []
    for engine in measured_engines(results):
        found = bounds_of(engine, results)
        if "decode" in found:
            d = found["decode"]
            work = f"{d['bytes_per_token'] / 1e6:.1f} MB per token ({d['kv_bytes_per_token'] / 1e6:.1f} of it KV)"
            share = f"{d['share']:.0%} of read bandwidth"
            rows.append(["  decode, 1 sequence", engine["name"], work, f"{d['gb_per_s']:.1f} GB/s", share])
        p = found["prompt"]
        speed, share = f"{p['gflop_per_s']:.0f} GFLOP/s", f"{p['share']:.0%} of matmul rate"
        rows.append(["  prompt", engine["name"], f"{p['gflop']:.1f} GFLOP", speed, share])
    rows.sort(key=lambda row: row[0])
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    pads: list[Callable[[str, int], str]] = [str.ljust, str.ljust, str.rjust, str.rjust, str.rjust]
    lines = ["  ".join(pad(text, w) for pad, text, w in zip(pads, row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([head, *lines])


def _missing(results: Record) -> list[str]:
    return [f"{e['name']}: {e['reason']}" for e in results["engines"] if e["status"] != MEASURED]


def _notes(results: Record) -> list[str]:
    peers = len(measured_engines(results)) > 1
    notes = [f"ratio: how many times better {OWN} is; above 1.00x it is ahead." if peers else ""]
    notes.append("\n".join(_missing(results)))
    return [*notes, _warning(results)]


def _warning(results: Record) -> str:
    """That others used the cores meanwhile, or nothing. Engines suffer from it unequally, so ratios are off too."""
    share = results["disturbance"]["foreign_cpu_share"]
    if share <= DISTURBED_SHARE:
        return ""
    return f"Warning: other processes took {share:.0%} of these cores during the run; measure again in quiet."
