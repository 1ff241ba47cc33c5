"""Figures against targets, as a table for the terminal or in Markdown. Works on the results record alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]
NOT_MEASURED = "not measured"


@dataclass(frozen=True, slots=True)
class Row:
    """`holds` is None where nothing was measured or nothing is promised."""

    figure: str
    value: str
    target: str = ""
    holds: bool | None = None


def rows(parts: Record) -> list[Row]:
    """A row or several for each part of a results record, in a fixed order."""
    makers = {
        "throughput": _throughput,
        "responsiveness": _responsiveness,
        "first-byte": _first_byte,
        "inter-token": _inter_token,
        "overload": _overload,
        "llama": _llama,
    }
    return [row for name, make in makers.items() if name in parts for row in make(parts[name])]


def _throughput(part: Record) -> Iterator[Row]:
    ratio, cpu = part["ratio"]["median"], part["cpu_ratio"]["median"]
    streams = f"{part['num_streams']} streams"
    yield Row(f"{streams}, served", f"{part['served_tokens_per_s']['median']:.1f} tok/s")
    yield Row(f"{streams}, engine alone", f"{part['batch_tokens_per_s']['median']:.1f} tok/s")
    yield Row("served / engine alone", f"{ratio:.3f} {_range(part['ratio'])}", ">= 0.85", ratio >= 0.85)
    served, batch = (part[name]["median"] * 1e6 for name in ("served_cpu_s_per_token", "batch_cpu_s_per_token"))
    yield Row("the same in CPU time", f"{cpu:.3f} ({batch:.0f} of {served:.0f} us per token)")


def _responsiveness(part: Record) -> Iterator[Row]:
    name = f"/health under {part['num_streams']} streams"
    yield _latency_row(name, part["streams_ms"])
    if part["tokenize_ms"] is None:
        yield Row("the same with 1 MiB to /tokenize", f"{NOT_MEASURED}: {part['tokenize_problem']}", "max <= 50 ms")
    else:
        yield _latency_row("the same with 1 MiB to /tokenize", part["tokenize_ms"])


def _latency_row(name: str, spread: Record) -> Row:
    value = f"p50 {spread['p50']:.1f}, p99 {spread['p99']:.1f}, max {spread['max']:.1f} ms"
    return Row(name, value, "max <= 50 ms", spread["max"] <= 50)


def _first_byte(part: Record) -> Iterator[Row]:
    overhead = part["overhead_p50_ms"]
    value = f"{overhead:.1f} ms ({part['served_p50_ms']:.1f} of which {part['engine_p50_ms']:.1f} the engine)"
    yield Row("first byte, HTTP over the engine, p50", value, "<= 5 ms", overhead <= 5)


def _inter_token(part: Record) -> Iterator[Row]:
    ratio = part["ratio"]["median"]
    value = f"{ratio:.2f} (p50 {part['p50_ms']['median']:.1f}, p99 {part['p99_ms']['median']:.1f} ms)"
    yield Row(f"inter-token p99 / p50, {part['num_streams']} streams", value, "<= 2", ratio <= 2)


def _overload(part: Record) -> Iterator[Row]:
    share = part["goodput_of_peak"]
    value = f"{share:.2f} ({part['goodput']:.2f} of {part['peak']:.2f} requests/s)"
    yield Row("goodput under 2 x load / peak", value, ">= 0.90", share >= 0.9)
    waits = part["refusal_ms"]
    if waits is not None:
        yield Row(f"refusal ({part['num_refused']}), p99", f"{waits['p99']:.1f} ms", "<= 100 ms", waits["p99"] <= 100)
    only_429 = set(part["refusal_statuses"]) <= {"429"} and not part["refusals_without_retry_after"]
    statuses = ", ".join(f"{count} x {status}" for status, count in part["refusal_statuses"].items()) or "none"
    yield Row("refusals, with Retry-After", statuses, "429 alone", only_429)
    num_bad = part["num_5xx"] + sum(part["other_errors"].values())
    yield Row("5xx and broken answers", str(num_bad), "0", num_bad == 0)
    after = part["recovery_s"]
    shown = "not within the run" if after is None else f"{after:.1f} s"
    base = f"first text within 1.2 x {part['base_ttft_p50_s'] * 1000:.0f} ms again"
    yield Row(base, shown, "<= 10 s", after is not None and after <= 10)


def _llama(part: Record) -> Iterator[Row]:
    name = f"{part.get('num_streams', 16)} streams, qengine / llama-server"
    if "problem" in part:
        yield Row(name, f"{NOT_MEASURED}: {part['problem']}", ">= 1.5")
        return
    ratio = part["ratio"]["median"]
    ours, theirs = part["own_tokens_per_s"]["median"], part["peer_tokens_per_s"]["median"]
    yield Row(name, f"{ratio:.2f} ({ours:.1f} to {theirs:.1f} tok/s)", ">= 1.5", ratio >= 1.5)


def _range(spread: Record) -> str:
    return f"[{spread['min']:.3f} to {spread['max']:.3f}]"


_VERDICTS = {True: "holds", False: "MISSED", None: ""}


def table(record: Record) -> str:
    """For the terminal."""
    lines = [["figure", "value", "target", ""]]
    lines += [[row.figure, row.value, row.target, _VERDICTS[row.holds]] for row in rows(record["parts"])]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    texts = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    texts.insert(1, "  ".join("-" * width for width in widths[:3]))
    return "\n".join([*texts, "", caption(record)]) + "\n"


def markdown(record: Record) -> str:
    """For a page."""
    lines = ["| figure | value | target | |", "|---|---|---|---|"]
    lines += [f"| {r.figure} | {r.value} | {r.target} | {_VERDICTS[r.holds]} |" for r in rows(record["parts"])]
    return "\n".join([*lines, "", caption(record)]) + "\n"


def caption(record: Record) -> str:
    """Where, what, and whether to believe it."""
    environment, shape = record["environment"], record["shape"]
    cores = record["cores"]
    place = f"server on CPU {cores['server']}, load on CPU {cores['load']}"
    if cores["server"] == cores["load"]:
        place = "server and load share ONE core: not comparable"
    lines = [
        f"{record['model']}, prompts of {shape['input_len']}, answers of {shape['output_len']} tokens, "
        f"median of {shape['num_runs']} runs; {place}; {environment['cpu']}; {environment['date']}"
    ]
    if record["foreign_share"] > 0.1:
        lines.append(f"Other processes took {record['foreign_share']:.0%} of the cores: these figures are disturbed.")
    return "\n".join(lines)
