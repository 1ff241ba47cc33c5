"""Writes overview.json, the Grafana dashboard.

    python deploy/grafana/generate.py > deploy/grafana/overview.json
    python deploy/grafana/generate.py --prefix vllm: > overview-vllm.json

Every query selects by the variables job, model_name and instance. A test holds each metric and label in it against a
live server. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

DEFAULT_PREFIX = "qengine:"
WIDTH = 24
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
QUANTILES = (0.5, 0.95, 0.99)

#: Selectors: of the engine's metrics, of the server's and HTTP's, and of the process's (which know no model).
ENGINE = 'job=~"$job",instance=~"$instance",model_name=~"$model_name"'
SERVER = 'job=~"$job",instance=~"$instance"'
RATE = "$__rate_interval"


class Queries:
    """Expressions over metrics with one prefix."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def engine(self, name: str, more: str = "") -> str:
        return f"{self._prefix}{name}{{{ENGINE}{more}}}"

    def server(self, name: str, more: str = "") -> str:
        return f"{self._prefix}{name}{{{SERVER}{more}}}"

    def rate(self, name: str, by: str = "", more: str = "") -> str:
        grouping = f" by ({by})" if by else ""
        return f"sum{grouping} (rate({self.engine(name, more)}[{RATE}]))"

    def quantile(self, quantile: float, name: str) -> str:
        return f"histogram_quantile({quantile}, {self.rate(name + '_bucket', 'le')})"

    def mean(self, name: str) -> str:
        return f"{self.rate(name + '_sum')} / {self.rate(name + '_count')}"

    def share_within(self, name: str, bound: str) -> str:
        """Share of values up to a bound, which must be one of the histogram's."""
        within = self.rate(name + "_bucket", more=f',le="{bound}"')
        return f"{within} / {self.rate(name + '_count')}"


def target(expr: str, legend: str = "", **more: Any) -> dict[str, Any]:
    return {"expr": expr, "legendFormat": legend or "__auto", "datasource": DATASOURCE, **more}


def panel(kind: str, title: str, targets: list[dict[str, Any]], unit: str, width: int, **more: Any) -> dict[str, Any]:
    for index, query in enumerate(targets):
        query["refId"] = chr(ord("A") + index)
    defaults: dict[str, Any] = {"unit": unit, "min": 0, **more.pop("defaults", {})}
    return {
        "type": kind,
        "title": title,
        "datasource": DATASOURCE,
        "targets": targets,
        "gridPos": {"w": width, "h": more.pop("height", 8)},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        **more,
    }


def stat(title: str, expr: str, unit: str = "short", *, steps: list[tuple[float | None, str]] | None = None) -> Any:
    """A single number. `steps` are (from this value, color)."""
    defaults = {}
    if steps:
        thresholds = [{"value": value, "color": color} for value, color in steps]
        defaults["thresholds"] = {"mode": "absolute", "steps": thresholds}
    options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "graphMode": "area", "colorMode": "value"}
    return panel("stat", title, [target(expr)], unit, 4, height=4, defaults=defaults, options=options)


def lines(title: str, targets: list[dict[str, Any]], unit: str = "short", *, stacked: bool = False) -> Any:
    custom: dict[str, Any] = {
        "fillOpacity": 30 if stacked else 5,
        "stacking": {"mode": "normal" if stacked else "none"},
    }
    options = {"tooltip": {"mode": "multi"}, "legend": {"displayMode": "list", "placement": "bottom"}}
    return panel("timeseries", title, targets, unit, 8, defaults={"custom": custom}, options=options)


def heatmap(title: str, q: Queries, name: str, unit: str) -> Any:
    query = target(q.rate(name + "_bucket", "le"), "{{le}}", format="heatmap")
    options = {"calculate": False, "yAxis": {"unit": unit}, "color": {"scheme": "Viridis", "mode": "scheme"}}
    return panel("heatmap", title, [query], unit, 8, options=options)


def row(title: str) -> dict[str, Any]:
    return {"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": {"w": WIDTH, "h": 1}}


def headline(q: Queries) -> list[Any]:
    all_http = f"sum (rate(http_requests_total{{{SERVER}}}[{RATE}]))"
    failed = f'sum (rate(http_requests_total{{{SERVER},status="5xx"}}[{RATE}])) or vector(0)'
    looked_up = q.rate("prefix_cache_queries_total")
    slo = [(None, "red"), (0.95, "orange"), (0.99, "green")]
    return [
        row("Now"),
        stat("Requests/s", all_http, "reqps"),
        stat("Input tokens/s", q.rate("prompt_tokens_total")),
        stat("Output tokens/s", q.rate("generation_tokens_total")),
        stat(
            "5xx", f"({failed}) / {all_http}", "percentunit", steps=[(None, "green"), (0.001, "orange"), (0.01, "red")]
        ),
        stat("Unreachable", 'sum (up{job=~"$job"} == 0) or vector(0)', steps=[(None, "green"), (1, "red")]),
        stat("Engines", f"sum ({q.engine('engine_healthy')})"),
        stat("TTFT p95", q.quantile(0.95, "time_to_first_token_seconds"), "s"),
        stat("Inter-token p95", q.quantile(0.95, "inter_token_latency_seconds"), "s"),
        stat("End to end p95", q.quantile(0.95, "e2e_request_latency_seconds"), "s"),
        stat("Running", f"sum ({q.engine('num_requests_running')})"),
        stat("Waiting", f"sum ({q.engine('num_requests_waiting')})"),
        stat(
            "KV cache",
            f"max ({q.engine('kv_cache_usage_perc')})",
            "percentunit",
            steps=[(None, "green"), (0.9, "orange"), (0.98, "red")],
        ),
        stat("Preemptions/s", q.rate("num_preemptions_total")),
        stat("Prefix hits", f"{q.rate('prefix_cache_hits_total')} / {looked_up}", "percentunit"),
        stat(
            "TTFT within $ttft_slo s",
            q.share_within("time_to_first_token_seconds", "$ttft_slo"),
            "percentunit",
            steps=slo,
        ),
        stat(
            "TPOT within $tpot_slo s",
            q.share_within("request_time_per_output_token_seconds", "$tpot_slo"),
            "percentunit",
            steps=slo,
        ),
        stat("Rejections/s", f"sum (rate({q.server('rejections_total')}[{RATE}]))"),
        stat("Ready", _ready(q)),
    ]


def _ready(q: Queries) -> str:
    ready = ',state="ready"'
    return f"sum ({q.server('engine_state', ready)})"


def per_model(q: Queries) -> list[Any]:
    columns = {
        "requests/s": q.rate("request_success_total", "model_name"),
        "input tok/s": q.rate("prompt_tokens_total", "model_name"),
        "output tok/s": q.rate("generation_tokens_total", "model_name"),
        "running": f"sum by (model_name) ({q.engine('num_requests_running')})",
        "waiting": f"sum by (model_name) ({q.engine('num_requests_waiting')})",
    }
    targets = [target(expr, name, format="table", instant=True) for name, expr in columns.items()]
    letters = [chr(ord("A") + index) for index in range(len(columns))]
    names = {f"Value #{letter}": name for letter, name in zip(letters, columns, strict=True)}
    transformations = [
        {"id": "merge", "options": {}},
        {"id": "organize", "options": {"excludeByName": {"Time": True}, "renameByName": names}},
    ]
    return [
        row("Models"),
        panel("table", "By model", targets, "short", WIDTH, height=6, transformations=transformations),
    ]


def latencies(q: Queries) -> list[Any]:
    panels = [row("Latency")]
    kinds = {
        "Time to first token": "time_to_first_token_seconds",
        "Inter-token latency": "inter_token_latency_seconds",
        "End to end": "e2e_request_latency_seconds",
    }
    for title, name in kinds.items():
        quantiles = [target(q.quantile(quantile, name), f"p{100 * quantile:g}") for quantile in QUANTILES]
        panels.append(lines(title, [*quantiles, target(q.mean(name), "mean")], "s"))
    panels += [heatmap(title, q, name, "s") for title, name in kinds.items()]
    phases = [target(q.mean(f"request_{name}_time_seconds"), name) for name in ("queue", "prefill", "decode")]
    steps = target(
        f"{q.rate('step_time_seconds_sum', 'phase')} / {q.rate('step_time_seconds_count', 'phase')}", "{{phase}}"
    )
    per_token = [target(q.quantile(x, "request_time_per_output_token_seconds"), f"p{100 * x:g}") for x in QUANTILES]
    return [
        *panels,
        lines("Mean time per phase", phases, "s", stacked=True),
        lines("Time per output token", per_token, "s"),
        lines("Mean time per step", [steps], "s", stacked=True),
        lines("Mean time per step in collectives", [target(q.mean("allreduce_seconds"), "slowest rank")], "s"),
    ]


def throughput(q: Queries) -> list[Any]:
    tokens = [
        target(q.rate("prompt_tokens_total"), "input"),
        target(q.rate("generation_tokens_total"), "output"),
    ]
    return [
        row("Throughput and load"),
        lines("Tokens/s", tokens),
        lines("Ended by reason", [target(q.rate("request_success_total", "finished_reason"), "{{finished_reason}}")]),
        lines("Tokens per step", [target(q.mean("iteration_tokens_total"), "mean")]),
        lines(
            "Running and waiting",
            [
                target(f"sum ({q.engine('num_requests_running')})", "running"),
                target(f"sum by (reason) ({q.engine('num_requests_waiting_by_reason')})", "waiting: {{reason}}"),
            ],
        ),
        lines("KV blocks", [target(f"sum by (state) ({q.engine('kv_blocks')})", "{{state}}")], stacked=True),
        lines(
            "Turned away, dropped, preempted",
            [
                target(f"sum by (reason) (rate({q.server('rejections_total')}[{RATE}]))", "{{reason}}"),
                target(f"sum (rate({q.server('stream_stalls_total')}[{RATE}]))", "stalled"),
                target(f"sum (rate({q.server('auth_failures_total')}[{RATE}]))", "wrong key"),
                target(q.rate("num_preemptions_total"), "preempted"),
            ],
        ),
    ]


def caching(q: Queries) -> list[Any]:
    hits = f"{q.rate('prefix_cache_hits_total')} / {q.rate('prefix_cache_queries_total')}"
    return [
        row("Prompts, outputs, cache"),
        heatmap("Prompt length", q, "request_prompt_tokens", "short"),
        heatmap("Output length", q, "request_generation_tokens", "short"),
        lines("Prefix cache hit rate", [target(hits, "hits")], "percentunit"),
        lines("Prompt tokens by source", [target(q.rate("prompt_tokens_by_source_total", "source"), "{{source}}")]),
    ]


def http() -> list[Any]:
    def rate(name: str, by: str) -> str:
        return f"sum by ({by}) (rate({name}{{{SERVER}}}[{RATE}]))"

    total, count = (rate(f"http_request_duration_seconds_{part}", "handler") for part in ("sum", "count"))
    return [
        row("HTTP and process"),
        lines("By status", [target(rate("http_requests_total", "status"), "{{status}}")], "reqps"),
        lines("By route", [target(rate("http_requests_total", "handler"), "{{handler}}")], "reqps"),
        lines("Mean duration", [target(f"{total} / {count}", "{{handler}}")], "s"),
        lines("CPU", [target(rate("process_cpu_seconds_total", "instance"), "{{instance}}")]),
        lines("Memory", [target(f"process_resident_memory_bytes{{{SERVER}}}", "{{instance}}")], "bytes"),
        lines("Open files", [target(f"process_open_fds{{{SERVER}}}", "{{instance}}")]),
    ]


def placed(panels: list[Any]) -> list[Any]:
    """Panels from left to right and top to bottom, with ids."""
    x = y = height = 0
    for number, item in enumerate(panels, start=1):
        place = item["gridPos"]
        if x + place["w"] > WIDTH or item["type"] == "row":
            x, y, height = 0, y + height, 0
        place.update(x=x, y=y)
        x, height = x + place["w"], max(height, place["h"])
        item["id"] = number
    return panels


def variables(prefix: str) -> list[dict[str, Any]]:
    def of_label(label: str, selector: str = "") -> dict[str, Any]:
        query = f"label_values({prefix}num_requests_running{selector}, {label})"
        return {
            "name": label,
            "type": "query",
            "datasource": DATASOURCE,
            "query": {"query": query, "refId": label},
            "definition": query,
            "refresh": 2,
            "multi": True,
            "includeAll": True,
            "current": {"text": "All", "value": "$__all"},
        }

    def choice(name: str, label: str, values: tuple[str, ...], chosen: str) -> dict[str, Any]:
        options = [{"text": value, "value": value, "selected": value == chosen} for value in values]
        current = {"text": chosen, "value": chosen}
        return {
            "name": name,
            "label": label,
            "type": "custom",
            "query": ",".join(values),
            "options": options,
            "current": current,
        }

    # The bounds must be those of the histograms, as Prometheus writes them.
    return [
        {"name": "datasource", "type": "datasource", "query": "prometheus"},
        of_label("job"),
        of_label("model_name", '{job=~"$job"}'),
        of_label("instance", '{job=~"$job",model_name=~"$model_name"}'),
        choice("ttft_slo", "TTFT SLO (s)", ("0.1", "0.25", "0.5", "1.0", "2.5", "5.0", "10.0"), "1.0"),
        choice("tpot_slo", "TPOT SLO (s)", ("0.025", "0.05", "0.1", "0.2", "0.5"), "0.1"),
    ]


def dashboard(prefix: str) -> dict[str, Any]:
    """The dashboard as Grafana 10.4 and newer read it."""
    q = Queries(prefix)
    panels = [*headline(q), *per_model(q), *latencies(q), *throughput(q), *caching(q), *http()]
    return {
        "uid": "qengine-overview",
        "title": "qengine overview",
        "tags": ["qengine", "llm"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": variables(prefix)},
        "annotations": {"list": []},
        "panels": placed(panels),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prefix", default=DEFAULT_PREFIX, help="the server's --metrics-prefix")
    json.dump(dashboard(parser.parse_args().prefix), sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
