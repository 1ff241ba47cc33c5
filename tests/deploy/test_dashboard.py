"""The dashboard: it is what its generator makes, and asks for nothing that a server does not show."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from qengine.serving.metrics.catalog import TOKEN_BOUNDS, TTFT_BOUNDS
from tests.serving.tiny import TEXT, body, small_server

FOLDER = Path(__file__).parents[2] / "deploy" / "grafana"
#: Prometheus itself adds these.
_OF_PROMETHEUS = {"job", "instance"}
_SELECTOR = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\{([^}]*)\}")


def generated(prefix: str) -> dict[str, Any]:
    command = [sys.executable, str(FOLDER / "generate.py"), "--prefix", prefix]
    done = subprocess.run(command, capture_output=True, timeout=60, check=True)
    board: dict[str, Any] = json.loads(done.stdout)
    return board


def expressions(board: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]


def queried(board: dict[str, Any]) -> Iterator[tuple[str, set[str]]]:
    """(metric, labels) of every selector."""
    definitions = [variable["definition"] for variable in board["templating"]["list"] if "definition" in variable]
    for text in [*expressions(board), *definitions]:
        for name, selector in _SELECTOR.findall(text):
            yield name, {part.split("=")[0].rstrip("!~") for part in selector.split(",") if part}


def shown(page: str) -> dict[str, set[str]]:
    """The labels of every sample name."""
    labels: dict[str, set[str]] = defaultdict(set)
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            labels[sample.name] |= set(sample.labels)
    return labels


@pytest.mark.parametrize("prefix", ["qengine:", "vllm:"])
def test_every_metric_it_asks_for_is_shown(prefix: str) -> None:
    board = generated(prefix)
    with small_server(prefix=prefix) as server:
        assert server.post(TEXT, body(max_tokens=2)).status_code == 200
        available = shown(server.get("/metrics").text)
    wanted = list(queried(board))
    assert len({name for name, _ in wanted}) > 30
    for name, labels in wanted:
        if name == "up":
            continue
        assert name in available, f"{name} is not a metric of the server"
        assert labels - _OF_PROMETHEUS <= available[name], f"{name} has no such labels: {labels}"
    grouped = {
        label
        for expr in expressions(board)
        for group in re.findall(r"by \(([^)]*)\)", expr)
        for label in group.split(", ")
    }
    assert grouped - _OF_PROMETHEUS <= {label for labels in available.values() for label in labels}


def test_every_metric_in_an_expression_has_a_selector() -> None:
    """So that the test above sees it, and the dashboard's variables apply."""
    for expr in expressions(generated("vllm:")):
        assert not re.search(r"(vllm:|http_|process_)[a-z0-9_]+(?![a-z0-9_{])", expr), expr


def test_the_committed_file_is_what_the_generator_makes() -> None:
    committed = json.loads((FOLDER / "overview.json").read_text(encoding="utf-8"))
    assert committed == generated("qengine:"), "run: python deploy/grafana/generate.py > deploy/grafana/overview.json"


def test_it_is_a_dashboard() -> None:
    board = generated("qengine:")
    names = {variable["name"] for variable in board["templating"]["list"]}
    assert {"datasource", "job", "model_name", "instance", "ttft_slo", "tpot_slo"} <= names
    used = {name for expr in expressions(board) for name in re.findall(r"\$([a-z_]+)", expr)}
    assert used - {"__rate_interval"} <= names
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24
        assert taken.isdisjoint(cells), f"{panel['title']} covers another panel"
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            refs = [target["refId"] for target in panel["targets"]]
            assert len(set(refs)) == len(refs)


def test_the_goals_are_bounds_of_the_histograms() -> None:
    """A goal between two bounds would select nothing."""
    choices = {
        v["name"]: v["query"].split(",") for v in generated("vllm:")["templating"]["list"] if v["type"] == "custom"
    }
    assert set(choices["ttft_slo"]) <= {str(bound) for bound in TTFT_BOUNDS}
    assert set(choices["tpot_slo"]) <= {str(bound) for bound in TOKEN_BOUNDS}
    for expr in expressions(generated("vllm:")):
        assert expr.count("(") == expr.count(")")
        assert expr.count("{") == expr.count("}")
