"""`bench serve` against a server with a scripted engine, and with a server of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from qengine import cli
from qengine.bench.report import table
from tests.engine.fixtures import path
from tests.serving.running import Running, serving
from tests.serving.scripted_engine import ScriptedEngine


@pytest.fixture
def server() -> Iterator[Running]:
    with serving(ScriptedEngine(), api_keys=("open-sesame",)) as running:
        yield running


def test_a_sweep_counts_what_was_sent(server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, chart = tmp_path / "load.json", tmp_path / "load.png"
    words = "--request-rate 200 inf --num-prompts 6 --random-input-len 20 --random-output-len 8 --vocab-size 500"
    words += " --goodput ttft:60000 e2el:60000 --api-key open-sesame"
    code = cli.main(
        ["bench", "serve", "--url", server.url, *words.split(), "--json", str(figures), "--plot", str(chart)]
    )
    assert code == 0
    server.wait_until_quiet()
    # A warm-up before each of the two rates.
    lengths = [(len(r.prompt_token_ids), r.max_tokens) for r in server.engine.prepared]
    assert sorted(lengths) == [(8, 2)] * 2 + [(20, 8)] * 12
    prompts = {tuple(r.prompt_token_ids) for r in server.engine.prepared if r.max_tokens == 8}
    assert len(prompts) == 12, "a prompt was sent twice: the prefix cache would answer it"
    record = json.loads(figures.read_text(encoding="utf-8"))
    assert [point["request_rate"] for point in record["points"]] == [200.0, "inf"]
    for point in record["points"]:
        assert (point["num_completed"], point["num_good"], point["errors"]) == (6, 6, {})
        assert point["num_output_tokens"] == 48
        assert point["ttft_ms"]["p50"] <= point["ttft_ms"]["p99"] <= point["e2el_ms"]["p99"]
    assert chart.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "all at once: 6 of 6 completed" in shown
    assert "(6 within ttft <= 60000 ms, e2el <= 60000 ms)" in shown


def test_refused_requests_are_shown_and_change_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(ScriptedEngine(max_num_seqs=1), max_queue=1) as server:
        words = "--num-prompts 30 --random-input-len 4 --random-output-len 100 --vocab-size 500"
        assert cli.main(["bench", "serve", "--url", server.url, *words.split()]) == 1
        server.wait_until_quiet()
    assert "failed: status 429: the server is full" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--request-rate 0", "--request-rate is 0, expected requests per second"),
        ("--num-prompts 0", "--num-prompts is 0, expected at least 1"),
        ("--goodput speed:1", "--goodput is 'speed:1', expected NAME:MILLISECONDS"),
        ("--plot load.bmp", "--plot is 'load.bmp', expected a name that ends in .png"),
        ("--json /absent/x.json", "--json is '/absent/x.json', expected a file in a folder that exists"),
        ("--url http://x --dtype float32", "--dtype is for a model in this process"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "serve", *words.split()]) == 2
    assert message in capsys.readouterr().err


def test_a_load_that_never_works_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(ScriptedEngine(max_model_len=8)) as server:
        assert cli.main(["bench", "serve", "--url", server.url]) == 1
    assert "a first request failed, nothing was measured: status 400" in capsys.readouterr().err


def test_a_late_generator_says_so() -> None:
    spread = {"mean": 1.0, "p50": 1.0, "p90": 1.0, "p99": 300.0}
    point = {"request_rate": 2.0, "num_completed": 1, "num_requests": 1, "duration_s": 1.0, "request_throughput": 1.0}
    point |= {"output_token_throughput": 1.0, "errors": {}, "send_delay_ms": spread}
    point |= dict.fromkeys(("ttft_ms", "itl_ms", "tpot_ms", "e2el_ms"))
    assert "late by 300 ms" in table([point], {})


def test_a_server_of_its_own_is_started_and_stopped(capfd: pytest.CaptureFixture[str]) -> None:
    words = "--num-prompts 3 --random-input-len 8 --random-output-len 4 --vocab-size 300 --max-model-len 128"
    words += " --no-enable-prefix-caching --dtype float32"
    assert cli.main(["bench", "serve", str(path("llama-awq-g64")), *words.split()]) == 0
    assert "3 of 3 completed" in capfd.readouterr().out
    assert cli.main(["bench", "serve", "/absent/model"]) == 1
    assert "no model at '/absent/model'" in capfd.readouterr().err
