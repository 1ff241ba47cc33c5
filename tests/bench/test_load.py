"""Loads, arrival times, percentiles and goodput: arithmetic against independent computations, and a fake clock."""

from __future__ import annotations

import asyncio
import heapq
import math
import statistics
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qengine.bench.figures import BOUNDS, Outcome, percentile, spread_ms, summarize
from qengine.bench.generator import run_load
from qengine.bench.load import LoadRequest, arrival_times, file_load, parse_bounds, random_ids, random_load
from qengine.client.api import ServerError
from qengine.errors import ConfigError


class FakeTime:
    """A clock that jumps to the next sleeper as soon as nothing else can run."""

    def __init__(self) -> None:
        self.now = 100.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        wake: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self.now + seconds, len(self._sleepers), wake))
        await wake

    async def drive(self) -> None:
        while True:
            for _ in range(20):
                await asyncio.sleep(0)
            if self._sleepers:
                self.now, _, wake = heapq.heappop(self._sleepers)
                wake.set_result(None)


def chunk(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text}]}


def simulate(due_s: list[float], first_s: list[float], gap_s: float, num_tokens: int) -> list[Outcome]:
    """Run the generator against a server that answers request i after first_s[i], then every gap_s."""
    fake = FakeTime()

    async def send(request: LoadRequest) -> AsyncGenerator[Mapping[str, Any], None]:
        index = request.max_tokens
        if first_s[index] < 0:
            raise ServerError("status 429: full", 429)
        await fake.sleep(first_s[index])
        for number in range(num_tokens):
            if number:
                await fake.sleep(gap_s)
            yield chunk("x")
        yield {"choices": [], "usage": {"completion_tokens": num_tokens}}

    async def run() -> list[Outcome]:
        driver = asyncio.ensure_future(fake.drive())
        requests = [LoadRequest("p", index) for index in range(len(due_s))]
        try:
            return await run_load(requests, due_s, send, clock=fake.clock, sleep=fake.sleep)
        finally:
            driver.cancel()

    return asyncio.run(run())


# The generator


def test_requests_go_out_when_they_are_due_though_none_has_been_answered() -> None:
    outcomes = simulate([0.0, 0.5, 0.75, 3.0], first_s=[10.0, 10.0, 10.0, 10.0], gap_s=1.0, num_tokens=2)
    assert [o.sent_s for o in outcomes] == pytest.approx([0.0, 0.5, 0.75, 3.0])
    assert [o.ttft_s for o in outcomes] == pytest.approx([10.0] * 4)
    assert [o.e2el_s for o in outcomes] == pytest.approx([11.0] * 4)


def test_latency_counts_from_when_a_request_was_due_not_sent() -> None:
    late = Outcome(due_s=1.0, sent_s=4.0, piece_s=(5.0, 5.5), end_s=5.5, num_tokens=2)
    assert (late.ttft_s, late.e2el_s) == (4.0, 4.5)


def test_a_failed_request_is_counted_and_not_timed() -> None:
    outcomes = simulate([0.0, 1.0], first_s=[2.0, -1.0], gap_s=0.25, num_tokens=5)
    figures = summarize(2.0, outcomes, {})
    assert figures["errors"] == {"status 429: full": 1}
    assert (figures["num_completed"], figures["num_requests"], figures["num_good"]) == (1, 2, 1)
    assert figures["ttft_ms"]["p99"] == pytest.approx(2000)
    assert figures["itl_ms"]["mean"] == figures["tpot_ms"]["p50"] == pytest.approx(250)
    assert figures["duration_s"] == pytest.approx(3.0)
    assert figures["output_token_throughput"] == pytest.approx(5 / 3)


def test_goodput_needs_every_bound() -> None:
    # First text after 1, 2, 3, 4 s; 0.1 s per token; all due at 0.
    outcomes = simulate([0.0] * 4, first_s=[1.0, 2.0, 3.0, 4.0], gap_s=0.1, num_tokens=11)
    for bounds, num_good in (
        ({}, 4),
        ({"ttft": 2500.0}, 2),
        ({"ttft": 2500.0, "tpot": 101.0}, 2),
        ({"ttft": 2500.0, "tpot": 99.0}, 0),
        ({"e2el": 4001.0}, 3),
        ({"ttft": 1500.0, "e2el": 1500.0}, 0),
    ):
        figures = summarize(math.inf, outcomes, bounds)
        assert figures["num_good"] == num_good
        assert figures["goodput"] == pytest.approx(num_good / 5.0)
    assert figures["request_rate"] == "inf"


# Arithmetic


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), abs=1e-6)


def test_a_spread_of_nothing_is_nothing() -> None:
    assert spread_ms([]) is None
    assert summarize(1.0, [], {})["goodput"] == 0
    with pytest.raises(ValueError, match="no percentile"):
        percentile([], 50)


def test_one_token_has_no_time_per_token() -> None:
    single = Outcome(0.0, 0.0, (1.0,), 1.0, 1)
    assert (single.tpot_s, single.gaps_s) == (None, ())
    assert single.is_good({"tpot": 1.0, "ttft": 1000.0})
    assert not single.is_good({"ttft": 999.0})


def test_arrivals_are_a_poisson_process() -> None:
    times = arrival_times(20_000, 4.0, seed=1)
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    assert min(gaps) >= 0
    # An exponential distribution: mean and deviation are equal, and 1/e of the gaps are longer than the mean.
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.03)
    assert statistics.pstdev(gaps) == pytest.approx(0.25, rel=0.05)
    assert sum(gap > 0.25 for gap in gaps) / len(gaps) == pytest.approx(math.exp(-1), abs=0.015)
    assert arrival_times(5, 4.0, seed=1) == times[:5] != arrival_times(5, 4.0, seed=2)
    assert arrival_times(3, math.inf, seed=1) == [0.0, 0.0, 0.0]


# Loads


def test_random_prompts_have_their_lengths_and_differ() -> None:
    load = random_load(50, 16, 7, vocab_size=300, seed=0)
    assert {(len(request.prompt), request.max_tokens) for request in load} == {(16, 7)}
    assert len({request.prompt[:4] for request in load}) == 50
    assert all(100 <= int(token) < 300 for request in load for token in request.prompt)
    assert random_load(50, 16, 7, vocab_size=300, seed=0) == load
    assert max(random_ids(1000, 50, 0)) < 50


def test_a_file_is_read_and_begins_again(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "größe"}\n\n{"prompt": "b", "max_tokens": 3, "more": 1}\n', encoding="utf-8")
    assert file_load(file, 3, 9) == [LoadRequest("größe", 9), LoadRequest("b", 3), LoadRequest("größe", 9)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("{", ":1 is no JSON"),
        ('{"prompt": "a"}\n[]', ':2 has no text in "prompt"'),
        ('{"prompt": ""}', ':1 has no text in "prompt"'),
        ('{"prompt": "a", "max_tokens": true}', 'has "max_tokens": True'),
        ('{"prompt": "a", "max_tokens": 0}', 'has "max_tokens": 0'),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        file_load(file, 3, 9)
    assert message in str(caught.value)
    with pytest.raises(ConfigError, match="cannot read"):
        file_load(tmp_path / "absent", 3, 9)


def test_bounds_are_read() -> None:
    assert parse_bounds(("ttft:1000", "tpot:0.5"), BOUNDS) == {"ttft": 1000.0, "tpot": 0.5}
    for wrong in ("ttft", "ttft:", "ttft:0", "ttft:nan", "itl:5", ":5"):
        with pytest.raises(ConfigError, match="expected NAME:MILLISECONDS"):
            parse_bounds((wrong,), BOUNDS)
