"""Twice what the server can carry, for a minute, and what comes after: goodput, refusals, recovery; and the chart.

    0.3 of the peak | 2 x the peak, a minute | 0.3 of the peak, half a minute        one open-loop Poisson schedule

Invariant: requests go out when they are due, whatever has become of the earlier ones; every latency counts from then.
The peak is measured first, on the same server: as many clients as it runs sequences, each sending its next request
when it has its answer.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.serving.load import LoadResult, requests_of, send
from benchmarks.serving.parts import Say
from benchmarks.serving.servers import Server
from qengine.bench.figures import Outcome, percentile
from qengine.bench.load import arrival_times
from qengine.bench.wire import stream_completion
from qengine.imports import import_late

QUIET, OVER = 0.3, 2.0
#: Of the chart, and of finding when the overload is over, in seconds.
WINDOW_S = 2.0
RECOVERY_WINDOW_S = 2.5


@dataclass(frozen=True, slots=True)
class Plan:
    """Lengths in tokens, times in seconds. A request is good if it is answered and its first text came in time."""

    input_len: int = 32
    output_len: int = 16
    num_running: int = 16
    num_queued: int = 16
    peak_s: float = 20.0
    base_s: float = 20.0
    over_s: float = 60.0
    after_s: float = 30.0
    ttft_bound_s: float = 10.0
    seed: int = 1


def measure(server: Server, plan: Plan, say: Say) -> dict[str, Any]:
    """All figures of the part."""
    send(server, requests_of(plan.num_running, plan.input_len, 8, 0)).check()
    peak = asyncio.run(_peak(server, plan))
    say(f"peak: {peak:.2f} requests/s")
    due_s, borders = schedule(plan, peak)
    requests = requests_of(len(due_s), plan.input_len, plan.output_len, plan.seed + 1)
    result = send(server, requests, due_s)
    figures = summarize(result, plan, peak, borders)
    say(
        f"goodput {figures['goodput']:.2f} requests/s under {figures['offered']:.2f}, "
        f"{figures['num_refused']} refused, recovered after {figures['recovery_s']} s"
    )
    return figures


async def _peak(server: Server, plan: Plan) -> float:
    """Requests per second of a closed loop, after a first round that only fills it."""
    ends: list[float] = []
    begin = time.perf_counter()
    until = begin + plan.peak_s

    async def client(number: int) -> None:
        for request in requests_of(1000, plan.input_len, plan.output_len, 10_000 + number):
            if time.perf_counter() >= until:
                return
            async with aclosing(stream_completion(server.address, None, request.body(server.model))) as chunks:
                async for _ in chunks:
                    pass
            ends.append(time.perf_counter())

    await asyncio.gather(*(client(number) for number in range(plan.num_running)))
    # From the end of the first round to the last end that had all clients at work; a round ends almost together.
    first = sorted(ends)[plan.num_running - 1]
    counted = [end for end in ends if first < end <= max(until, first)]
    return len(counted) / (max(counted) - first) if counted else len(ends) / (max(ends) - begin)


def schedule(plan: Plan, peak: float) -> tuple[list[float], tuple[float, float, float]]:
    """When requests are due, and where the three phases end."""
    borders = (plan.base_s, plan.base_s + plan.over_s, plan.base_s + plan.over_s + plan.after_s)
    due: list[float] = []
    start = 0.0
    for number, (end, share) in enumerate(zip(borders, (QUIET, OVER, QUIET), strict=True)):
        rate = share * peak
        times = arrival_times(max(1, int(3 * rate * (end - start)) + 20), rate, plan.seed + number)
        due += [start + time_s for time_s in times if start + time_s < end]
        start = end
    return due, borders


def summarize(result: LoadResult, plan: Plan, peak: float, borders: tuple[float, float, float]) -> dict[str, Any]:
    """Goodput of the overload, what refusals were like, and when the first text came as soon as before again."""
    base_end, over_end, _ = borders
    outcomes = result.outcomes
    good = [o for o in outcomes if o.is_good({"ttft": plan.ttft_bound_s * 1000})]
    in_time = [o for o in good if base_end <= o.end_s < over_end]
    refused = [outcomes[number] for number in result.refusals]
    statuses = Counter(str(refusal.status) for refusal in result.refusals.values())
    # From its sending on: what the generator is late by is its own.
    waits = [(o.end_s - o.sent_s) * 1000 for o in refused]
    others = [o.error for n, o in enumerate(outcomes) if o.error is not None and n not in result.refusals]
    base = [o.ttft_s for o in outcomes if o.ttft_s is not None and o.due_s < base_end]
    base_s = statistics.median(base)
    return {
        "plan": {name: getattr(plan, name) for name in plan.__dataclass_fields__},
        "peak": peak,
        "offered": sum(base_end <= o.due_s < over_end for o in outcomes) / plan.over_s,
        "goodput": len(in_time) / plan.over_s,
        "goodput_of_peak": len(in_time) / plan.over_s / peak,
        "num_requests": len(outcomes),
        "num_refused": len(refused),
        "refusal_statuses": dict(statuses),
        "refusals_without_retry_after": sum(refusal.retry_after is None for refusal in result.refusals.values()),
        "refusal_ms": {f"p{p}": percentile(waits, p) for p in (50, 99)} if waits else None,
        "num_5xx": sum((refusal.status or 0) >= 500 for refusal in result.refusals.values()),
        "other_errors": dict(Counter(others)),
        "base_ttft_p50_s": base_s,
        "recovery_s": recovery(outcomes, base_s, over_end),
        "late_p99_ms": percentile([(o.sent_s - o.due_s) * 1000 for o in outcomes], 99),
        "borders_s": list(borders),
        "timeline": timeline(outcomes, plan, borders[-1]),
    }


def recovery(outcomes: Sequence[Outcome], base_s: float, over_end: float) -> float | None:
    """Seconds after the overload until the time to first text is within 1.2 of what it was; None if it never is.

    It is from the first window on of which both the median and that of all that follows are: a single window holds few
    requests, and all together would hide a slow beginning.
    """
    after = [(o.due_s - over_end, o.ttft_s) for o in outcomes if o.due_s >= over_end and o.ttft_s is not None]
    for number in sorted({int(since // RECOVERY_WINDOW_S) for since, _ in after}):
        start = number * RECOVERY_WINDOW_S
        rest = [ttft for since, ttft in after if since >= start]
        window = [ttft for since, ttft in after if start <= since < start + RECOVERY_WINDOW_S]
        if statistics.median(window) <= 1.2 * base_s and statistics.median(rest) <= 1.2 * base_s:
            return start
    return None


def timeline(outcomes: Sequence[Outcome], plan: Plan, end_s: float) -> list[dict[str, Any]]:
    """Per window: requests due, answered well and refused per second, and the median time to first text."""
    rows = []
    for number in range(int(end_s // WINDOW_S)):
        low, high = number * WINDOW_S, (number + 1) * WINDOW_S
        due = [o for o in outcomes if low <= o.due_s < high]
        ends = [o for o in outcomes if low <= o.end_s < high]
        times = [o.ttft_s for o in due if o.ttft_s is not None]
        good = sum(o.is_good({"ttft": plan.ttft_bound_s * 1000}) for o in ends)
        rows.append(
            {
                "s": low,
                "offered": len(due) / WINDOW_S,
                "good": good / WINDOW_S,
                "refused": sum(o.error is not None for o in ends) / WINDOW_S,
                "ttft_p50_s": statistics.median(times) if times else None,
            }
        )
    return rows


def draw(path: Path, figures: Mapping[str, Any]) -> None:
    """Requests per second above, time to first text below, over the time of the run. Raises ConfigError."""
    module = import_late("matplotlib.figure", needed_for="--plot", install="pip install 'qengine[plot]'")
    figure = module.Figure(figsize=(9, 5.6), layout="constrained")
    rates, waits = figure.subplots(2, 1, sharex=True)
    rows = figures["timeline"]
    times = [row["s"] + WINDOW_S / 2 for row in rows]
    base_end, over_end, end = figures["borders_s"]
    for axis in (rates, waits):
        axis.axvspan(base_end, over_end, color="#f3e8d2", zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.3)
        axis.set_xlim(0, end)
    rates.plot(times, [row["offered"] for row in rows], color="#8c959f", linewidth=1.2, label="sent")
    rates.plot(times, [row["refused"] for row in rows], color="#c2410c", linewidth=1.2, label="refused (429)")
    rates.plot(times, [row["good"] for row in rows], color="#0f766e", linewidth=2.2, label="answered in time")
    rates.axhline(figures["peak"], color="#1f2328", linewidth=0.9, linestyle=":", label="peak")
    rates.set_ylabel("requests/s")
    rates.set_ylim(bottom=0)
    rates.legend(loc="upper right", frameon=False)
    rates.set_title(f"Twice the peak for {over_end - base_end:.0f} s", loc="left", fontsize=11)
    known = [(t, row["ttft_p50_s"]) for t, row in zip(times, rows, strict=True) if row["ttft_p50_s"] is not None]
    waits.plot([t for t, _ in known], [s for _, s in known], color="#0f766e", linewidth=2.2, marker="o", markersize=3)
    bound = 1.2 * figures["base_ttft_p50_s"]
    waits.axhline(bound, color="#1f2328", linewidth=0.9, linestyle=":", label="as before, + 20 %")
    waits.set_ylabel("time to first text, s (median)")
    waits.set_xlabel("seconds")
    waits.set_ylim(bottom=0)
    waits.legend(loc="upper right", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
