"""A bar chart of a results file as plain SVG: `python -m benchmarks.plot RESULTS.json CHART.svg`.

One small panel per figure, since their units differ; a thin line spans the lowest to the highest run. The drawing needs
no script and no font of its own, and follows the reader's light or dark mode.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from benchmarks.common import BenchmarkError, write_text
from benchmarks.report import OWN, Metric, caption, load_results, measured_engines, metrics_of

WIDTH = 720
_MARGIN = 24
_LABEL_WIDTH = 150
_VALUE_WIDTH = 96
_BAR_HEIGHT = 16
_BAR_STEP = 23
_PANEL_GAP = 18
_HEADING_HEIGHT = 22
_TOP = 66
_BOTTOM = 16
_UNITS = {"tok/s": "tokens per second", "s": "seconds"}

_STYLE = """
    text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
    .ink { fill: #1f2328; } .faint { fill: #59636e; } .own { fill: #0f766e; } .peer { fill: #b4bcc5; }
    .range { stroke: #1f2328; stroke-opacity: 0.55; stroke-width: 1.5; } .axis { stroke: #d1d9e0; }
    @media (prefers-color-scheme: dark) {
      .ink { fill: #f0f6fc; } .faint { fill: #9198a1; } .own { fill: #2dd4bf; } .peer { fill: #59636e; }
      .range { stroke: #f0f6fc; } .axis { stroke: #3d444d; }
    }
"""


def draw(results: Mapping[str, Any]) -> str:
    """The chart of a results record as an SVG document with a transparent background."""
    engines = measured_engines(results)
    metrics = metrics_of(results["workload"])
    panel_height = _HEADING_HEIGHT + len(engines) * _BAR_STEP
    height = _TOP + len(metrics) * (panel_height + _PANEL_GAP) - _PANEL_GAP + _BOTTOM
    body = [_text(_MARGIN, 28, caption(results), "ink", 17, bold=True), _text(_MARGIN, 49, _machine(results), "faint")]
    for number, metric in enumerate(metrics):
        body += _panel(metric, engines, _TOP + number * (panel_height + _PANEL_GAP))
    summary = "; ".join(f"{m.label}: {_summary(m, engines)}" for m in metrics)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}">',
        f"  <title>{escape(caption(results))}</title>",
        f"  <desc>{escape(summary)}</desc>",
        f"  <style>{_STYLE}  </style>",
        *(f"  {line}" for line in body),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _machine(results: Mapping[str, Any]) -> str:
    environment, workload = results["environment"], results["workload"]
    threads, runs = workload["threads"], workload["runs"]
    cores = f"{threads} thread{'s' if threads > 1 else ''}"
    times = f"median of {runs} runs" if runs > 1 else "one run"
    return f"{environment['cpu']}, {cores}, {times}, {environment['date'][:10]}"


def _panel(metric: Metric, engines: Sequence[Mapping[str, Any]], top: float) -> list[str]:
    """One metric: a heading and a bar per engine, all to the panel's own scale."""
    left, right = _MARGIN + _LABEL_WIDTH, WIDTH - _MARGIN - _VALUE_WIDTH
    scale = (right - left) / max(e["results"][metric.key]["max"] for e in engines)
    direction = "longer is better" if metric.more_is_better else "shorter is better"
    unit = _UNITS.get(metric.unit, metric.unit)
    lines = [
        f'<text x="{_MARGIN}" y="{top + 12}" font-size="13"><tspan class="ink" font-weight="600">'
        f'{escape(metric.label)}</tspan><tspan class="faint">, {unit}, {direction}</tspan></text>'
    ]
    bottom = top + _HEADING_HEIGHT + len(engines) * _BAR_STEP
    lines.append(_line(left, top + _HEADING_HEIGHT - 2, left, bottom - 4, "axis"))
    for number, engine in enumerate(engines):
        spread = engine["results"][metric.key]
        y = top + _HEADING_HEIGHT + number * _BAR_STEP
        end, middle, base = left + spread["median"] * scale, y + _BAR_HEIGHT / 2, y + _BAR_HEIGHT - 4
        is_own = engine["name"] == OWN
        lines.append(_text(left - 10, base, engine["label"], "ink" if is_own else "faint", bold=is_own, end=True))
        lines.append(_bar(left, y, end - left, "own" if is_own else "peer"))
        if spread["max"] > spread["min"]:
            lines.append(_line(left + spread["min"] * scale, middle, left + spread["max"] * scale, middle, "range"))
        text_x = max(end, left + spread["max"] * scale) + 8
        lines.append(_text(text_x, base, metric.show(spread["median"]), "ink", bold=is_own))
    return lines


def _summary(metric: Metric, engines: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{e['label']} {metric.show(e['results'][metric.key]['median'])} {metric.unit}" for e in engines)


def _text(x: float, y: float, text: str, style: str, size: int = 13, *, bold: bool = False, end: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    anchor = ' text-anchor="end"' if end else ""
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" font-size="{size}"{weight}{anchor}>{escape(text)}</text>'


def _bar(x: float, y: float, width: float, style: str) -> str:
    return (
        f'<rect class="{style}" x="{x:.1f}" y="{y:.1f}" width="{max(width, 1.5):.1f}" height="{_BAR_HEIGHT}" rx="2"/>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def main(argv: Sequence[str] | None = None) -> int:
    """Draw a results file; returns 0, or 2 when a path or the file is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description="Draw a results file as SVG.")
    parser.add_argument("results", type=Path, help="JSON file of benchmarks.offline")
    parser.add_argument("chart", type=Path, help="SVG file to write")
    options = parser.parse_args(argv)
    try:
        write_text(options.chart, draw(load_results(options.results)))
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
