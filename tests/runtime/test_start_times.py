"""StartTimes: laps that add up, and two that overlap."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from qengine import LLM
from qengine.runtime.loader import LoadTimes
from qengine.runtime.start_times import StartTimes, process_age
from tests.engine.fixtures import path


def ticking(*moments: float) -> StartTimes:
    clock: Iterator[float] = iter(moments)
    return StartTimes(1.5, lambda: next(clock))


def test_phases_add_up_and_what_overlaps_does_not() -> None:
    watch = ticking(10.0, 11.0, 15.0, 15.5)
    watch.lap("plan")
    watch.loaded(LoadTimes(num_bytes=6_000_000_000, seconds=4.0, read_seconds=3.0, convert_seconds=3.5))
    watch.lap("warm-up")
    assert watch.seconds == {
        "import": 1.5,
        "plan": 1.0,
        "weights": 4.0,
        "warm-up": 0.5,
        "read": 3.0,
        "convert": 3.5,
        "total": 7.0,
    }
    lines = watch.table().splitlines()
    assert [line.split()[0] for line in lines] == [
        "start",
        "import",
        "plan",
        "weights",
        "read",
        "convert",
        "warm-up",
        "total",
    ]
    assert "6.00 GB at 2.00 GB/s" in lines[4]


def test_of_several_ranks_the_slowest_counts() -> None:
    """One reads longest, another converts longest; they overlap, so that nothing is added up."""
    watch = ticking(0.0, 4.0)
    watch.loaded(LoadTimes(8_000_000_000, 4.0, 4.0, 1.0), LoadTimes(2_000_000_000, 3.0, 0.5, 2.5))
    assert watch.seconds == {"import": 1.5, "weights": 4.0, "read": 4.0, "convert": 2.5, "total": 5.5}
    lines = watch.table().splitlines()
    assert lines[3].split()[:2] == ["read", "4.00"]
    assert "8.00 GB at 2.00 GB/s" in lines[3]
    assert lines[4].split()[:2] == ["convert", "2.50"]
    assert all(line.endswith("(the slowest of 2 ranks)") for line in lines[3:5])


def test_nothing_is_read_for_dummy_weights() -> None:
    watch = ticking(0.0, 1.0)
    watch.loaded(LoadTimes(num_bytes=0, seconds=1.0, read_seconds=0.0, convert_seconds=1.0))
    assert "read" not in watch.table()
    assert "convert" in watch.table()


def test_a_process_grows_older() -> None:
    age = process_age()
    assert age > 0
    time.sleep(0.05)
    assert process_age() >= age + 0.03


def test_an_engine_says_where_its_start_went(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "qengine")
    with LLM(path("llama-awq-g64"), max_model_len=64) as llm:
        seconds = llm.engine.info.start_seconds
    phases = ["plan", "tokenizer", "weights", "kv cache", "warm-up"]
    assert list(seconds) == [*phases, "read", "convert", "total"]
    assert seconds["total"] == pytest.approx(sum(seconds[phase] for phase in phases))
    assert 0 < seconds["convert"] <= seconds["weights"]
    assert any(message.startswith("start ") for message in caplog.messages)
