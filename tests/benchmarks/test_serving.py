"""The benchmark of the server: its arithmetic by hand, and its load on a server with a scripted engine."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import BenchmarkError
from benchmarks.serving import overload, parts, report
from benchmarks.serving.__main__ import PARTS, main, parse_options
from benchmarks.serving.load import LoadResult, Refusal, requests_of, send
from benchmarks.serving.overload import Plan
from benchmarks.serving.parts import Shape
from benchmarks.serving.servers import Cores, Server, cpu_seconds, pinned
from qengine.bench.figures import Outcome
from qengine.client.address import parse_address
from qengine.request import RequestOutput
from tests.serving.quiet import scrape
from tests.serving.running import Running, serving
from tests.serving.scripted_engine import ScriptedEngine
from tests.waiting import wait_until

HERE = Cores(*[sorted(os.sched_getaffinity(0))[0]] * 2)
NUM_RUNNING, NUM_QUEUED = 4, 4
STEP_S = 0.004


def quiet(_: str) -> None:
    pass


class PacedEngine(ScriptedEngine):
    """A step takes some milliseconds."""

    def step(self) -> list[RequestOutput]:
        time.sleep(STEP_S)
        return super().step()


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving(PacedEngine(max_num_seqs=NUM_RUNNING), max_queue=NUM_QUEUED) as server:
        yield server


@pytest.fixture(scope="module")
def server(running: Running) -> Server:
    return Server("scripted", parse_address(running.url), "scripted", os.getpid())


# Load and readings


def test_tokens_and_times_of_streams_at_once(server: Server) -> None:
    result = send(server, requests_of(4, 16, 12, 1)).check()
    assert result.num_tokens == 48
    assert result.seconds >= 11 * STEP_S
    assert result.tokens_per_s == pytest.approx(48 / result.seconds)
    assert result.cpu_seconds >= 0


def test_refusals_keep_their_status_and_header_and_fail_a_check(running: Running, server: Server) -> None:
    def num_refused() -> float:
        return scrape(running).get('qengine:rejections_total{reason="queue_full"}', 0)

    before = num_refused()
    running.engine.hold()
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(send, server, requests_of(NUM_RUNNING + NUM_QUEUED + 3, 16, 12, 1))
        try:
            # None has left before all have come.
            wait_until(lambda: num_refused() == before + 3)
        finally:
            running.engine.allow()
        result = sent.result()
    assert list(result.refusals.values()) == [Refusal(429, "1")] * 3
    assert [n for n, o in enumerate(result.outcomes) if o.error is not None] == sorted(result.refusals)
    with pytest.raises(BenchmarkError, match="3 of 11 requests failed: status 429"):
        result.check()


def test_inter_token_figures(server: Server) -> None:
    figures = parts.inter_token(server, Shape(16, 12, 2), 4, quiet)
    assert figures["num_streams"] == 4
    # A reader that is late finds several tokens at once, but not before they are made.
    assert 0 < figures["p50_ms"]["median"] <= figures["p99_ms"]["median"]
    assert figures["p99_ms"]["median"] >= 1000 * STEP_S
    assert figures["ratio"]["median"] >= 1.0


def test_responsiveness_without_a_tokenize_route_says_so(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_has_tokenize", lambda server: False)
    figures = parts.responsiveness(server, Shape(16, 12, 1), HERE, 4, quiet)
    assert figures["streams_ms"]["num"] >= 1
    assert 0 < figures["streams_ms"]["p50"] <= figures["streams_ms"]["max"]
    assert figures["tokenize_ms"] is None
    assert "/tokenize" in figures["tokenize_problem"]


def test_the_route_is_looked_for_on_the_server(running: Running, server: Server) -> None:
    has_route = running.post("/tokenize", {"model": "scripted", "prompt": "Hello"}).status_code == 200
    assert parts._has_tokenize(server) is has_route


#: A step gives each running request a token, so that no more than this is possible, however fast the machine is.
REQUESTS_PER_S = NUM_RUNNING / (16 * STEP_S)
PLAN = Plan(16, 16, NUM_RUNNING, NUM_QUEUED, peak_s=0.6, base_s=2.0, over_s=2.0, after_s=2.0)


def test_the_peak_is_below_what_is_possible(server: Server) -> None:
    # Counted over a short time, hence the room.
    assert 0 < asyncio.run(overload._peak(server, PLAN)) < 1.5 * REQUESTS_PER_S


def test_an_overload_is_refused_and_drawn(
    running: Running, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def peak(server: Server, plan: Plan) -> float:
        return REQUESTS_PER_S

    monkeypatch.setattr(overload, "_peak", peak)
    figures = overload.measure(server, PLAN, quiet)
    assert figures["offered"] > 1.5 * REQUESTS_PER_S
    assert figures["refusal_statuses"] == {"429": figures["num_refused"]}
    assert figures["num_refused"] > 0
    assert figures["refusals_without_retry_after"] == figures["num_5xx"] == 0
    assert figures["other_errors"] == {}
    assert 0 < figures["goodput"] <= figures["offered"]
    assert [row["s"] for row in figures["timeline"]] == [0.0, 2.0, 4.0]
    running.wait_until_quiet()
    chart = tmp_path / "chart.png"
    overload.draw(chart, figures)
    assert chart.read_bytes().startswith(b"\x89PNG")


# Arithmetic


def outcome(due: float, ttft: float, end: float | None = None, error: str | None = None) -> Outcome:
    pieces = () if error else (due + ttft,)
    return Outcome(due, due, pieces, due + ttft if end is None else end, 1, error)


def test_the_schedule_has_three_phases_with_their_rates() -> None:
    plan = Plan(base_s=100, over_s=100, after_s=100)
    due, borders = overload.schedule(plan, peak=10.0)
    assert borders == (100, 200, 300)
    assert due == sorted(due)
    counts = [sum(low <= d < low + 100 for d in due) for low in (0, 100, 200)]
    # Poisson: three standard deviations.
    assert abs(counts[0] - 300) < 52
    assert abs(counts[1] - 2000) < 134
    assert abs(counts[2] - 300) < 52
    assert overload.schedule(plan, peak=10.0)[0] == due


@pytest.mark.parametrize(
    ("ttfts", "expected"),
    [
        ({0: 1.0, 2: 1.1, 4: 1.19}, 0.0),
        ({0: 5.0, 2.5: 1.3, 5: 1.19, 7.5: 1.0}, 5.0),
        ({0: 1.0, 2.5: 3.0, 5: 1.0}, 0.0),  # One slow request is none.
        ({0: 1.0, 2.5: 3.0, 5: 3.0}, None),  # A relapse is.
        ({}, None),
    ],
)
def test_recovery_is_when_the_medians_are_low(ttfts: dict[float, float], expected: float | None) -> None:
    outcomes = [outcome(50 + second, ttft) for second, ttft in ttfts.items()]
    assert overload.recovery([outcome(0, 9.0), *outcomes], 1.0, 50.0) == expected


def test_the_summary_counts_what_ended_well_during_the_overload() -> None:
    plan = Plan(base_s=10, over_s=10, after_s=10, ttft_bound_s=2.0)
    outcomes = [
        outcome(1, 0.5),
        outcome(11, 0.5),
        outcome(12, 3.0),  # Too late to be good.
        outcome(13, 0.1, error="status 429"),
        outcome(14, 0.2, error="status 503"),
        outcome(15, 0.2, error="the connection failed"),
        outcome(19, 1.5),  # Ends after the overload.
        outcome(25, 0.5),
    ]
    refusals = {3: Refusal(429, "1"), 4: Refusal(503, None)}
    figures = overload.summarize(LoadResult(outcomes, refusals, 0.0), plan, 0.2, (10, 20, 30))
    assert figures["goodput"] == pytest.approx(0.1)
    assert figures["goodput_of_peak"] == pytest.approx(0.5)
    assert figures["offered"] == pytest.approx(0.6)
    assert figures["refusal_statuses"] == {"429": 1, "503": 1}
    assert figures["refusals_without_retry_after"] == 1
    assert figures["num_5xx"] == 1
    assert figures["other_errors"] == {"the connection failed": 1}
    assert figures["refusal_ms"]["p50"] == pytest.approx(150)
    assert figures["recovery_s"] == 5.0
    verdicts = {row.figure: row.holds for row in report.rows({"overload": figures})}
    assert list(verdicts.values()) == [False, False, False, False, True]


def test_cpu_time_is_that_of_the_process() -> None:
    before, own = cpu_seconds(os.getpid()), time.process_time()
    while time.process_time() - own < 0.2:
        pass
    assert 0.1 < cpu_seconds(os.getpid()) - before < 5


def test_a_pinned_block_restores_the_cpus() -> None:
    before = os.sched_getaffinity(0)
    with pinned(HERE.server):
        assert os.sched_getaffinity(0) == {HERE.server}
    assert os.sched_getaffinity(0) == before


# The command


def record(**figures: Any) -> dict[str, Any]:
    return {
        "benchmark": "serving-cpu",
        "environment": {"cpu": "a CPU", "date": "2026-01-01"},
        "model": "tiny",
        "shape": {"input_len": 32, "output_len": 128, "num_runs": 5},
        "cores": {"server": 1, "load": 0},
        "foreign_share": 0.5,
        "parts": figures,
    }


def test_the_table_says_what_holds_and_what_was_not_measured() -> None:
    def spread(value: float) -> dict[str, float]:
        return {"median": value, "min": value, "max": value}

    throughput = {
        "num_streams": 32,
        "served_tokens_per_s": spread(80.0),
        "batch_tokens_per_s": spread(100.0),
        "ratio": spread(0.8),
        "cpu_ratio": spread(0.9),
        "served_cpu_s_per_token": spread(0.010),
        "batch_cpu_s_per_token": spread(0.009),
    }
    latency = {"num": 9, "p50": 1.0, "p99": 9.0, "max": 49.0}
    responsiveness = {"num_streams": 32, "streams_ms": latency, "tokenize_ms": None, "tokenize_problem": "no route"}
    shown = report.table(record(throughput=throughput, responsiveness=responsiveness, llama={"problem": "not given"}))
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert "served / engine alone 0.800 [0.800 to 0.800] >= 0.85 MISSED" in lines
    assert "/health under 32 streams p50 1.0, p99 9.0, max 49.0 ms max <= 50 ms holds" in lines
    assert "16 streams, qengine / llama-server not measured: not given >= 1.5" in lines
    assert "Other processes took 50% of the cores: these figures are disturbed." in lines
    assert "| served / engine alone | 0.800 [0.800 to 0.800] | >= 0.85 | MISSED |" in report.markdown(
        record(throughput=throughput)
    )


def test_only_some_parts_write_no_results_unless_asked() -> None:
    assert parse_options(["--only", "overload,throughput"]).only == ("throughput", "overload")
    assert parse_options(["--only", "overload"]).json is None
    full = parse_options([])
    assert full.only == PARTS
    assert full.json.name == "serving-cpu.json"
    assert full.plot.name == "overload.png"


@pytest.mark.parametrize("words", [["--only", "speed"], ["--runs", "0"], ["--llama-server", "/nowhere"]])
def test_wrong_options_end_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert words[0] in capsys.readouterr().err


def test_other_results_are_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"benchmark": "offline-cpu"}', encoding="utf-8")
    assert main(["--show", str(other)]) == 2
    assert "no results of benchmarks.serving" in capsys.readouterr().err
