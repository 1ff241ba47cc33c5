"""The figures of `bench serve` as a table, and as a chart in a file.

Invariant: the table and the chart show what the JSON holds, nothing else. matplotlib is loaded only for a chart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qengine.errors import ConfigError
from qengine.imports import import_late

_LATENCIES = {"ttft_ms": "TTFT", "itl_ms": "inter-token", "tpot_ms": "TPOT", "e2el_ms": "end to end"}
_INSTALL = "pip install 'qengine[plot]'"
CHART_SUFFIXES = (".png", ".svg", ".pdf")


def table(points: Sequence[Mapping[str, Any]], bounds_ms: Mapping[str, float]) -> str:
    """A block per rate."""
    blocks = [_block(point, bounds_ms) for point in points]
    return "\n\n".join(blocks) + "\n"


def _block(point: Mapping[str, Any], bounds_ms: Mapping[str, float]) -> str:
    rate = point["request_rate"]
    head = "all at once" if rate == "inf" else f"{rate:g} requests/s"
    lines = [
        f"{head}: {point['num_completed']} of {point['num_requests']} completed in {point['duration_s']:.1f} s, "
        f"{point['request_throughput']:.2f} requests/s, {point['output_token_throughput']:.1f} output tok/s",
        f"  {'ms':<12}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}",
    ]
    for key, label in _LATENCIES.items():
        spread = point[key]
        if spread is not None:
            lines.append(f"  {label:<12}" + "".join(f"{spread[name]:>10.1f}" for name in ("mean", "p50", "p90", "p99")))
    if bounds_ms:
        limits = ", ".join(f"{name} <= {bound:g} ms" for name, bound in bounds_ms.items())
        lines.append(f"  goodput      {point['goodput']:.2f} requests/s ({point['num_good']} within {limits})")
    for error, count in point["errors"].items():
        lines.append(f"  ! {count} failed: {error}")
    delay = point["send_delay_ms"]
    if delay is not None and delay["p99"] > 100:
        lines.append(f"  ! this generator was late by {delay['p99']:.0f} ms (p99): the load was not what was asked for")
    return "\n".join(lines)


def check_chart(file: str) -> None:
    """Refuse a chart that could not be drawn, before minutes are spent on measuring. Raises ConfigError."""
    if Path(file).suffix not in CHART_SUFFIXES:
        raise ConfigError(f"--plot is '{file}', expected a name that ends in {', '.join(CHART_SUFFIXES)}")
    import_late("matplotlib", needed_for="--plot", install=_INSTALL)


def draw(path: Path, points: Sequence[Mapping[str, Any]], bounds_ms: Mapping[str, float], title: str) -> None:
    """Latencies and throughput over the request rate; over the only point where there is one."""
    figure_module = import_late("matplotlib.figure", needed_for="--plot", install=_INSTALL)
    figure = figure_module.Figure(figsize=(10, 6.4), layout="constrained")
    axes = figure.subplots(2, 2).flat
    figure.suptitle(title)
    names = ["all" if point["request_rate"] == "inf" else f"{point['request_rate']:g}" for point in points]
    places = range(len(points))
    for axis, key, bound in zip(axes, ("ttft_ms", "tpot_ms", "e2el_ms"), ("ttft", "tpot", "e2el"), strict=False):
        for percent, style in (("p50", "o-"), ("p90", "s--"), ("p99", "^:")):
            axis.plot(places, [(p[key] or {}).get(percent, float("nan")) for p in points], style, label=percent)
        if bound in bounds_ms:
            axis.axhline(bounds_ms[bound], color="gray", linewidth=1, label="bound")
        axis.set_ylabel(f"{_LATENCIES[key]}, ms")
        axis.set_ylim(bottom=0)
    last = axes[3]
    last.plot(places, [p["request_throughput"] for p in points], "o-", label="completed")
    last.plot(places, [p["goodput"] for p in points], "s--", label="goodput")
    last.set_ylabel("requests/s")
    last.set_ylim(bottom=0)
    for axis in figure.axes:
        axis.set_xticks(list(places), names)
        axis.set_xlabel("request rate, 1/s")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path)
