"""The GPU check without a GPU: parts that continue, results that are written after each, tables and aims."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_check
from benchmarks.common import InputError
from benchmarks.gpu import report_attention, report_models
from benchmarks.gpu.parts import PART_SECONDS, PARTS, Origin, Part, State, fingerprint
from benchmarks.gpu.problems import ROWS, SHAPES, Workload, num_copies
from benchmarks.gpu.report import check_results, markdown_report
from benchmarks.gpu.report_matmul import ratios, target_lines

#: Asks git, which the parts of a check do each.
environment_once = cache(gpu_check.environment_record)
CARD = {
    "name": "Test Card", "slug": "test-card", "arch": 90, "num_sms": 132, "l2_bytes": 50 * 2**20,
    "versions": "torch 2, triton 3", "driver_and_clocks": None,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _the_machine_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "environment_record", environment_once)


def options(tmp_path: Path, **changes: Any) -> argparse.Namespace:
    values = {
        "parts": [], "limit": 10**6, "fresh": False, "gemlite": None, "marlin": None, "results": tmp_path / "results",
    }  # fmt: skip
    return argparse.Namespace(**{**values, **changes})


def measured(contender: str, us: float, rows: int = 1, **changes: Any) -> dict[str, Any]:
    return {
        "shape": "8B o", "in_features": 4096, "out_features": 4096, "rows": rows, "dtype": "float16", "group_size": 128,
        "zero": "const", "bytes": 9_000_000, "flop": 2 * rows * 4096**2, "configuration": "16x128 r32 w4 s4",
        "split_k": 4, "reason": "rule", "error": 1e-4, "error_bound": 1e-3, "contender": contender,
        "status": "measured", "us": us, "us_min": us, "us_max": us, **changes,
    }  # fmt: skip


def decoded(rate: float, batch: int, weights: str = "4-bit, groups of 128", **changes: Any) -> dict[str, Any]:
    return {
        "model": "llama-3-8b", "weights": weights, "copy_bytes_per_s": 3e12, "variant": "graphs", "what": "decode",
        "batch": batch, "status": "measured", "tokens_per_s": rate, "step_seconds": batch / rate,
        "bytes_per_step": 5e9, "of_bound": 0.4, **changes,
    }  # fmt: skip


def attended(contender: str, us: float, kind: str = "decode", **changes: Any) -> dict[str, Any]:
    return {
        "kind": kind, "format": "float16", "batch": 8, "context": 8192, "rows": 8, "bytes": 300_000_000,
        "flop": 10**9, "copies": 2, "tile": "16x64 w2 s3", "error": 1e-4, "error_bound": 1e-3,
        "contender": contender, "status": "measured", "us": us, "us_min": us, "us_max": us,
        "copy_bytes_per_s": 3e12, **changes,
    }  # fmt: skip


_MODEL = {"model": "llama-3-8b", "weights": "4-bit, groups of 128"}
#: What parts that run models would answer.
MADE_UP: Mapping[str, Sequence[dict[str, Any]]] = {
    "attention": [
        attended("qengine", 125.0), attended("torch", 100.0), attended("qengine", 900.0, "prompt"),
        attended("torch", 300.0, "prompt"), {**attended("torch", 0.0, "chunk"), "status": "unavailable", "why": "no"},
    ],
    "end-to-end": [
        {**_MODEL, "what": "memory", "memory_limit": 24 * 2**30, "weight_bytes": 6 * 2**30, "load_seconds": 3.0,
         "kv": {"auto": {"blocks": 10, "tokens": 160}, "int8": {"blocks": 19, "tokens": 304}}},
        {**_MODEL, "what": "prefill", "variant": "graphs", "prompt_tokens": 2048, "tokens_per_s": 12345.0},
        decoded(270.0, 1), decoded(3000.0, 32), decoded(2700.0, 32, "16-bit"),
        *({**_MODEL, "what": "profile", "variant": "graphs", "batch": batch, "kernel_seconds": 1e-3,
           "outside_kernels": outside} for batch, outside in ((1, 0.1), (32, 0.2), (64, None))),
        {**_MODEL, "what": "decode", "variant": "graphs", "batch": 128, "status": "left out",
         "why": "9 KV blocks are needed and 8 fit"},
        {**_MODEL, "what": "peak", "variant": "graphs", "peak_reserved": 20 * 2**30, "card_used": 21 * 2**30},
    ],
    "serving": [
        {**_MODEL, "requests": 64, "contender": "qengine", "seconds": 4.0, "tokens_per_s": 2000.0,
         "peak_reserved": 2**34},
        {**_MODEL, "requests": 64, "contender": "transformers", "timed_requests": 6, "seconds": 20.0,
         "tokens_per_s": 40.0, "peak_reserved": 2**34},
    ],
    "logits": [
        {"model": "llama", "weights": "16-bit", "mode": "prefill", "dtype": "bfloat16", "positions": 9,
         "max_error": 0.02, "mean_error": 0.002, "max_bound": 0.05, "mean_bound": 0.005, "top1": 0.99,
         "peer_max_error": 0.02, "peer_mean_error": 0.002, "peer_top1": 0.98, "passed": True},
    ],
    "fit": [
        {"model": "llama-3-70b", "rank": rank, "ranks": 2, "sequences": 8, "context": 2048, "memory_limit": 24 * 2**30,
         "planned_bytes": 23 * 2**30, "peak_reserved": peak, "peak_loading": 19 * 2**30, "decode_tokens_per_s": 61.25}
        for rank, peak in ((0, 23 * 2**30), (1, 22 * 2**30))
    ],
}  # fmt: skip


class FakeRunner:
    """Stands for `run_part`: says what it was asked and answers by kind."""

    def __init__(self, failing: str = "") -> None:
        self.ran: list[str] = []
        self.failing = failing

    def __call__(self, part: Part, extras: Mapping[str, Any]) -> dict[str, Any]:
        self.ran.append(part.name)
        if part.name == self.failing:
            return {"status": "failed", "seconds": 1, "records": [], "summary": "1 failed"}
        records: list[dict[str, Any]] = []
        if part.kind == "bandwidth":
            records = [{"copy_bytes_per_s": 3e12}]
        elif part.kind == "matmul":
            records = [measured("qengine", 8.0), measured("cuBLAS", 20.0)]
            records.append({**measured("Marlin", 0), "status": "unavailable", "why": "no built copy given (--marlin)"})
        else:
            records = list(MADE_UP.get(part.kind, ()))
        return {"status": "ok", "seconds": 1, "records": records, "summary": "3 passed"}


def state(
    tmp_path: Path, sources: str = "a", card: str = "Test Card", versions: str = "1", peers: Sequence[str] = ()
) -> State:
    return State(tmp_path / "state", Origin(sources, card, versions, frozenset(peers)))


def test_everything_runs_once_and_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runner = FakeRunner()
    assert gpu_check.run(options(tmp_path), [], CARD, state(tmp_path), runner) == 0
    assert runner.ran == [part.name for part in PARTS]
    again = FakeRunner()
    assert gpu_check.run(options(tmp_path), [], CARD, state(tmp_path), again) == 0
    assert again.ran == []
    (file,) = (tmp_path / "results").glob("test-card-*.json")
    results = check_results(json.loads(file.read_text()))
    assert results["pending"] == []
    assert results["copy_bytes_per_s"] == 3e12
    assert len(results["tests"]) == sum(part.kind == "tests" for part in PARTS)
    text = file.with_suffix(".md").read_text()
    assert text == markdown_report(results)
    assert "| 8B o | 1 | 8.0 | 1125 | 38% |" in text
    assert "2.50x" in text
    assert "Marlin: no built copy given" in text
    assert "parts are left" not in capsys.readouterr().out


def test_other_sources_or_another_card_begin_anew(tmp_path: Path) -> None:
    gpu_check.run(options(tmp_path), [], CARD, state(tmp_path), FakeRunner())
    others = ({"sources": "b"}, {"card": "Other Card"}, {"versions": "2"})
    for other in others:
        assert len(state(tmp_path, **other).pending(PARTS)) == len(PARTS)
    # Peers that were not there have to be measured; tests have nothing to do with them.
    pending = state(tmp_path, peers=["marlin"]).pending(PARTS)
    assert pending == [part for part in PARTS if part.kind == "matmul"]
    runner = FakeRunner()
    gpu_check.run(options(tmp_path, fresh=True), [], CARD, state(tmp_path), runner)
    assert len(runner.ran) == len(PARTS)


def test_time_runs_out_and_the_next_call_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = FakeRunner()
    assert gpu_check.run(options(tmp_path, limit=1), [], CARD, state(tmp_path), first) == 75
    assert first.ran == [PARTS[0].name]
    assert f"{len(PARTS) - 1} parts are left" in capsys.readouterr().out
    (file,) = (tmp_path / "results").glob("*.json")
    assert json.loads(file.read_text())["pending"] == [part.name for part in PARTS[1:]]
    second = FakeRunner()
    assert gpu_check.run(options(tmp_path), [], CARD, state(tmp_path), second) == 0
    assert second.ran == [part.name for part in PARTS[1:]]


def test_a_failed_part_fails_the_check_and_is_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = PARTS[1].name
    assert gpu_check.run(options(tmp_path), [], CARD, state(tmp_path), FakeRunner(failing=name)) == 1
    assert f"failed: {name}" in capsys.readouterr().err
    # What has not run goes first, so that a part that always fails holds nobody up.
    other = State(tmp_path / "other", Origin("a", "Test Card", "1"))
    other.save(PARTS[0], {"status": "failed", "summary": ""})
    assert other.pending(PARTS) == [*PARTS[1:], PARTS[0]]
    runner = FakeRunner()
    assert gpu_check.run(options(tmp_path), [], CARD, state(tmp_path), runner) == 0
    assert runner.ran == [name]


def test_parts_by_name(tmp_path: Path) -> None:
    runner = FakeRunner()
    gpu_check.run(options(tmp_path, parts=["8b-float16"]), [], CARD, state(tmp_path), runner)
    assert runner.ran
    assert all("8b-float16" in name for name in runner.ran)
    models = FakeRunner()
    gpu_check.run(options(tmp_path, parts=["end-to-end", "serving"]), [], CARD, state(tmp_path), models)
    assert len(models.ran) == sum(part.kind in ("end-to-end", "serving") for part in PARTS)
    with pytest.raises(InputError, match="no part is called nothing"):
        gpu_check.run(options(tmp_path, parts=["nothing"]), [], CARD, state(tmp_path), runner)


def test_parts_are_short_and_their_files_exist() -> None:
    assert len({part.name for part in PARTS}) == len(PARTS)
    for part in PARTS:
        assert part.seconds <= PART_SECONDS < 480
        for argument in (argument for run in part.runs for argument in run):
            assert not argument.endswith(".py") or (gpu_check.REPOSITORY / argument).is_file()


def test_what_is_worth_most_fits_three_calls() -> None:
    """The first parts, in their order, in calls of 480 s that begin nothing they cannot end."""
    wanted = {"attention", "end-to-end-8b", "end-to-end-8b-16-bit", "logits", "serving", "matmul-8b-float16-g128"}
    left, calls = list(PARTS), 3
    done: list[str] = []
    for _ in range(calls):
        seconds = 480
        while left and left[0].seconds <= seconds:
            seconds -= left[0].seconds
            done.append(left.pop(0).name)
    assert wanted <= set(done)
    assert done[:2] == ["tests-kernels", "tests-attention"]


def test_pytest_understands_every_run() -> None:
    """Each run has tests, no test is in two runs of a part, and the attention tests are all in one."""
    parts = [part for part in PARTS if part.kind == "tests"]
    (attention,) = (part for part in parts if part.name == "tests-attention")
    runs = [run for part in parts for run in part.runs]
    found = dict(zip([*runs, "whole"], collected([*runs, attention.runs[0][:1]]), strict=True))
    for part in parts:
        tests = [test for run in part.runs for test in found[run]]
        assert all(found[run] for run in part.runs)
        assert len(tests) == len(set(tests))
    assert {test for run in attention.runs for test in found[run]} == set(found["whole"])


def collected(runs: Sequence[Sequence[str]]) -> list[list[str]]:
    """The tests that pytest finds for each, without plugins, as where a GPU is; one process imports torch for all."""
    script = "import json, pytest, sys\nfor run in json.loads(sys.argv[1]):\n    "
    script += "print('ended', int(pytest.main(['--collect-only', '-p', 'no:cacheprovider', *run])))"
    command = [sys.executable, "-c", script, json.dumps(runs)]
    bare = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=gpu_check.REPOSITORY, env=bare)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ended 0") == len(runs), done.stdout[-3000:]
    return [[line for line in out.splitlines() if "::" in line] for out in done.stdout.split("ended 0")[:-1]]


def test_a_part_in_which_nothing_passed_is_no_success(capsys: pytest.CaptureFixture[str]) -> None:
    def status(*ends: tuple[int, str]) -> str:
        runs = [("tests/test_some.py", "-k", "x")] * len(ends)
        record = gpu_check._test_record(runs, [gpu_check._End(code, out, "") for code, out in ends], 2.0)
        return str(record["status"])

    assert status((0, "3 passed, 1 skipped in 2 s\n")) == "ok"
    assert status((0, "4 skipped in 2 s\n")) == "failed"
    assert status((1, "1 failed, 3 passed in 2 s\n")) == "failed"
    assert "4 skipped" in capsys.readouterr().err
    assert status((0, "3 passed\n"), (0, "2 passed\n")) == "ok"
    assert status((0, "3 passed\n"), (1, "1 failed\n")) == "failed"


def test_runs_go_side_by_side_and_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[Sequence[str]] = []

    def passes(command: Sequence[str], **options: Any) -> Any:
        commands.append(command)
        return argparse.Namespace(returncode=0, stdout=f"{len(commands)} passed\n", stderr="")

    monkeypatch.setattr(gpu_check.subprocess, "run", passes)
    part = Part("some", "tests", 1, (("tests/test_a.py",), ("tests/test_b.py", "-k", "x")))
    record = gpu_check.run_part(part, {})
    assert record["status"] == "ok"
    assert sorted(command[-1] for command in commands) == ["tests/test_a.py", "x"]
    assert "test_a: " in record["summary"]
    assert "test_b -k x: " in record["summary"]


def test_a_wrong_result_is_flagged(tmp_path: Path) -> None:
    gpu_check.run(options(tmp_path), [], CARD, state(tmp_path), FakeRunner())
    (file,) = (tmp_path / "results").glob("*.json")
    results = json.loads(file.read_text())
    assert "WRONG" not in markdown_report(results)
    results["matmul"][0]["error"] = 0.5
    assert "WRONG RESULT: 8B o, M 1" in markdown_report(results)


def test_a_part_that_breaks_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any, **options: Any) -> Any:
        return argparse.Namespace(returncode=1, stdout='{"us": 1}\nnoise\n', stderr="trace\nRuntimeError: no memory\n")

    monkeypatch.setattr(gpu_check.subprocess, "run", fails)
    record = gpu_check.run_part(PARTS[-1], {})
    assert record["status"] == "failed"
    assert record["records"] == [{"us": 1}]
    assert "RuntimeError: no memory" in record["summary"]
    tests = gpu_check.run_part(PARTS[0], {})
    assert tests["status"] == "failed"


def test_without_a_gpu_it_says_what_to_do(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu_check.main([]) == 2
    message = capsys.readouterr().err
    assert "no CUDA device" in message
    assert "make test" in message


def test_wrong_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--marlin", str(tmp_path / "none")], ["--limit", "soon"]):
        with pytest.raises(SystemExit) as caught:
            gpu_check.main(arguments)
        assert caught.value.code == 2
    assert "no folder" in capsys.readouterr().err
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    assert gpu_check.main(["--show", str(bad)]) == 2
    assert "not a results file" in capsys.readouterr().err
    assert gpu_check.main(["--show", str(tmp_path / "none.json")]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_aims_name_the_worst_problem() -> None:
    records = [
        measured("qengine", 10.0, 8), measured("torch int4", 12.0, 8), measured("cuBLAS", 30.0, 8),
        measured("qengine", 10.0, 16), measured("torch int4", 9.0, 16), measured("cuBLAS", 30.0, 16),
        measured("qengine", 10.0, 2), measured("torch int4", 1.0, 2),
    ]  # fmt: skip
    assert sorted(r for _, name, r in ratios(records) if name == "torch int4") == [0.1, 0.9, 1.2]
    lines = target_lines(records)
    assert lines[0].startswith("M 4 to 16: 1.0x torch int4 on 1 of 2 problems; lowest 0.90x (8B o, M 16")
    assert lines[1].startswith("M 1 to 16: 2.0x cuBLAS on 2 of 2 problems; lowest 3.00x")
    assert len(lines) == 2


def test_aims_of_models_and_attention() -> None:
    models, serving = MADE_UP["end-to-end"], MADE_UP["serving"]
    assert report_models.target_lines(models, serving) == [
        "reached: llama-3-8b, one sequence: 270 of 260 tokens/s",
        "MISSED: llama-3-8b, 32 sequences: 1.11 of 1.2 times the speed of 16-bit weights",
        "MISSED: at most 15% of a recorded step outside kernels on 1 of 2 problems; highest 20%",
        "reached: serving: 50.0 of 24 times transformers",
    ]
    assert report_models.target_lines([], []) == []
    lines = report_attention.target_lines(MADE_UP["attention"])
    assert lines[0].startswith("reached: attention, decode from 8192 tokens on: 60% of copy bandwidth on 1 of 1")
    assert lines[1].startswith("MISSED: attention, prompts: 50% of torch's speed on 0 of 1 problems; lowest 33%")
    assert report_attention.target_lines([]) == []


def test_the_report_shows_models_and_attention(tmp_path: Path) -> None:
    gpu_check.run(options(tmp_path), [], CARD, state(tmp_path), FakeRunner(failing="logits"))
    (file,) = (tmp_path / "results").glob("*.json")
    text = file.with_suffix(".md").read_text()
    for line in (
        "| graphs | 1 | 270 | 3.70 | 40% | 10% |",
        "| graphs | 128 | left out: 9 KV blocks are needed and 8 fit | - | - | - |",
        "- graphs: a prompt of 2048 tokens at 12345 tokens/s",
        "Tokens that the KV cache holds, by format: 160 in auto, 304 in int8.",
        "| transformers | 6 | 20.0 | 40 | 16.0 |",
        "| float16 | 8 | 8192 | 125.0 | 2400 | 80% | 0.80x |",
        "| prompt | float16 | 16x64 w2 s3 | 900.0 | 1.1 | 0.33x |",
        "- attention, torch, chunk, float16, 8 x 8192: no",
        "- logits: 1 failed",
        "| llama-3-70b | 0 of 2 | 8 | 2048 | 24.0 | 23.0 | 23.0 | 100.0% | 19.0 | 61.2 | ok |",
        "| llama-3-70b | 1 of 2 | 8 | 2048 | 24.0 | 23.0 | 22.0 | 95.7% | 19.0 | 61.2 | OFF THE PLAN |",
    ):
        assert line in text
    old = {key: value for key, value in json.loads(file.read_text()).items() if key not in MADE_UP and key != "failed"}
    assert "## llama-3-8b" not in markdown_report(old)


def test_copies_defeat_the_cache() -> None:
    assert num_copies(8 * 2**20, 50 * 2**20) == 20
    assert num_copies(2**30, 50 * 2**20) == 2


def test_workloads_survive_json() -> None:
    for part in PARTS:
        if part.workload is not None:
            kind: Any = type(part.workload)
            assert kind.from_json(json.loads(json.dumps(part.workload.to_json()))) == part.workload
            assert not isinstance(part.workload, Workload) or part.workload.shapes in SHAPES
    assert ROWS[0] == 1


def test_the_fingerprint_follows_the_sources() -> None:
    assert fingerprint() == fingerprint()
    assert len(fingerprint()) == 16
