"""The benchmark of collectives runs both transports, and its record and table say the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import collectives
from benchmarks.collectives import Plan, measure, table
from benchmarks.common import BenchmarkError


def test_both_transports_are_timed() -> None:
    plan = Plan(2, shapes=((1, 64), (8, 576)), calls=3, warm_calls=1, rounds=1)
    rows = measure(plan)
    assert [(row["rows"], row["hidden"]) for row in rows] == [(1, 64), (8, 576)]
    for row in rows:
        staged, gloo = (row[f"{name}_seconds"]["median"] for name in ("host-staged", "gloo"))
        assert staged > 0
        assert row["gloo_over_host_staged"] == gloo / staged
    text = table(plan, rows)
    assert "8 x 576" in text
    assert len(text.splitlines()) == 5


def test_a_rank_that_fails_is_an_error() -> None:
    with pytest.raises(BenchmarkError, match="ended with exit code 1"):
        measure(Plan(2, dtype="no_such_type", shapes=((1, 1),), rounds=1))


def test_the_command_writes_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spread = {"median": 1e-4, "min": 1e-4, "max": 1e-4, "values": [1e-4]}
    row = {
        "rows": 1,
        "hidden": 576,
        "gloo_over_host_staged": 1.0,
        "host-staged_seconds": spread,
        "gloo_seconds": spread,
    }
    monkeypatch.setattr(collectives, "measure", lambda plan: [row])
    path = tmp_path / "found.json"
    assert collectives.main(["--json", str(path), "--ranks", "3"]) == 0
    record = json.loads(path.read_text())
    assert record["ranks"] == 3
    assert record["all_reduce"] == [row]
    assert "over 3 ranks" in capsys.readouterr().out
