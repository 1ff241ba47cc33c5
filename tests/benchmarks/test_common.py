from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.common import (
    InputError,
    Spread,
    Workload,
    check_writable,
    random_prompt,
    write_text,
)


def test_spread_is_median_and_extremes() -> None:
    spread = Spread.of([5.0, 1.0, 3.0, 100.0])
    assert (spread.median, spread.low, spread.high) == (4.0, 1.0, 100.0)
    assert spread.to_json() == {"median": 4.0, "min": 1.0, "max": 100.0, "values": [5.0, 1.0, 3.0, 100.0]}


def test_workload_survives_json() -> None:
    workload = Workload(threads=3, batches=(1, 8), decode_tokens=7)
    assert Workload.from_json(json.loads(json.dumps(workload.to_json()))) == workload


def test_mean_decode_context_is_the_average_over_the_steps() -> None:
    workload = Workload(threads=1, decode_prompt_tokens=10, decode_tokens=5)
    # Step i attends to the prompt, the first token and the i tokens after it.
    lengths = [10 + 1 + step for step in range(5)]
    assert workload.mean_decode_context == sum(lengths) / len(lengths)


def test_prompts_are_reproducible_and_differ_between_seeds() -> None:
    prompt = random_prompt(200, 50, seed=1)
    assert prompt == random_prompt(200, 50, seed=1)
    assert prompt != random_prompt(200, 50, seed=2)
    assert set(prompt) <= set(range(50))
    assert len(set(prompt)) > 25


def test_check_writable_makes_folders_and_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "results.json"
    check_writable(path)
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_path_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"cannot write .*file/results.json.*choose another path"):
        check_writable(tmp_path / "file" / "results.json")


def test_a_folder_is_no_results_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        write_text(tmp_path, "x")


def test_write_text_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("something much longer")
    write_text(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
