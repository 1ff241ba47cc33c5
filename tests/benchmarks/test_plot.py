from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.plot import WIDTH, draw, main
from benchmarks.report import metrics_of
from tests.benchmarks import records

SVG = "{http://www.w3.org/2000/svg}"


def drawn() -> ElementTree.Element:
    return ElementTree.fromstring(draw(records.results()))


def test_bars_are_as_long_as_their_figures_are_large() -> None:
    bars = drawn().findall(f"{SVG}rect")
    widths = [float(bar.attrib["width"]) for bar in bars]
    medians = [
        e["results"][m.key]["median"]
        for m in metrics_of(records.results()["workload"])
        for e in records.results()["engines"][:2]
    ]
    assert len(widths) == len(medians) == 10
    for own, peer in zip(range(0, 10, 2), range(1, 10, 2), strict=True):
        assert widths[own] / widths[peer] == pytest.approx(medians[own] / medians[peer], rel=0.01)
    assert [bar.attrib["class"] for bar in bars] == ["own", "peer"] * 5


def test_every_figure_and_engine_is_named_and_text_is_escaped() -> None:
    text = " ".join("".join(node.itertext()) for node in drawn().iter(f"{SVG}text"))
    for word in ("decode, 16 sequences", "qengine", "llama.cpp", "1000", "A <fast> & small CPU", "shorter is better"):
        assert word in text


def test_nothing_is_drawn_outside() -> None:
    root = drawn()
    height = float(root.attrib["height"])
    for bar in root.iter(f"{SVG}rect"):
        assert float(bar.attrib["x"]) + float(bar.attrib["width"]) <= WIDTH
        assert float(bar.attrib["y"]) + float(bar.attrib["height"]) <= height
    for line in root.iter(f"{SVG}line"):
        assert float(line.attrib["x2"]) <= WIDTH


def test_it_follows_dark_mode_and_loads_nothing() -> None:
    document = draw(records.results())
    assert "prefers-color-scheme: dark" in document
    assert "script" not in document
    assert "href" not in document


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, chart = tmp_path / "r.json", tmp_path / "images" / "chart.svg"
    source.write_text(json.dumps(records.results()))
    assert main([str(source), str(chart)]) == 0
    assert chart.read_text() == draw(records.results())
    assert main([str(tmp_path / "none.json"), str(chart)]) == 2
    assert "cannot read" in capsys.readouterr().err
