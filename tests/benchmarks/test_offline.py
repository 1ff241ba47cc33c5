"""The command from end to end, with scripted engines in place of the real ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks import contest, offline
from benchmarks.common import BenchmarkError
from benchmarks.engines.base import ModelFacts, SpeedReading, StartReading, Task
from benchmarks.engines.own import OwnEngine
from benchmarks.report import load_results
from tests.benchmarks.records import model_facts


class Script:
    """What happened, in order, and where an engine shall fail."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.problems: dict[str, str] = {}
        self.fails_at: dict[str, str] = {}
        self.interrupt_at: str | None = None

    def note(self, event: str) -> None:
        self.log.append(event)
        if event == self.interrupt_at:
            raise KeyboardInterrupt
        engine, _, step = event.partition(" ")
        if self.fails_at.get(engine) == step:
            raise BenchmarkError("it broke")


class Scripted:
    """An engine that answers at once: its n-th speed is n times `pace`."""

    meaning: Mapping[str, str] = {"decode": "scripted"}

    def __init__(self, name: str, pace: float, script: Script) -> None:
        self.name = self.label = name
        self._pace, self._script, self._rounds = pace, script, 0

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *_: object) -> None:
        self._script.log.append(f"{self.name} closed")

    def problem(self, model: ModelFacts) -> str | None:
        return self._script.problems.get(self.name)

    def version(self) -> str:
        return "1"

    def prepare(self, task: Task) -> None:
        self._script.note(f"{self.name} prepare")

    def start(self, task: Task) -> StartReading:
        self._script.note(f"{self.name} start")
        return StartReading(1.0, 2**20)

    def speed(self, task: Task, round_number: int) -> SpeedReading:
        self._script.note(f"{self.name} speed{round_number}")
        self._rounds += 1
        value = self._rounds * self._pace
        decode = {batch: value * batch for batch in task.workload.batches}
        return SpeedReading(value, decode, 1000, 8, 2**21)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    script = Script()
    bound = {"read_bytes_per_s": 1e9, "matmul_flop_per_s": {"bfloat16": 1e9}}

    def engines(options: Any) -> list[Scripted]:
        return [Scripted(OwnEngine.name, 20, script), *(Scripted(name, 10, script) for name in options.peers)]

    monkeypatch.setattr(offline, "_engines", engines)
    monkeypatch.setattr(offline, "describe_model", lambda *_: model_facts())
    monkeypatch.setattr(contest, "probe_machine", lambda _: bound)
    return script


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "r.json"


def run(path: Path, *arguments: str) -> int:
    return offline.main(["--json", str(path), *arguments])


def test_engines_take_turns_after_one_warm_up_each(script: Script, path: Path) -> None:
    assert run(path, "--runs", "2", "--peers", "llama.cpp") == 0
    own, peer = "qengine", "llama.cpp"
    turns = [f"{engine} {step}" for n in range(2) for engine in (own, peer) for step in ("start", f"speed{n}")]
    warm_up = [f"{engine} {step}" for engine in (own, peer) for step in ("prepare", "start")]
    assert script.log == [*warm_up, *turns, "llama.cpp closed", "qengine closed"]


def test_the_results_file(script: Script, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script.problems["transformers"] = "not installed: pip install gguf"
    assert run(path, "--runs", "3", "--batch", "4,1") == 0
    results = load_results(path)
    assert results["workload"]["batches"] == [1, 4]
    own, peer, missing = results["engines"]
    assert own["results"]["decode_4"] == {"median": 160, "min": 80, "max": 240, "values": [80, 160, 240]}
    assert peer["results"]["prompt"]["values"] == [10, 20, 30]
    assert own["results"]["peak_memory"]["median"] == 2**20
    assert own["bounds"]["decode"]["share"] > 0
    assert (missing["status"], missing["reason"]) == ("not installed", script.problems["transformers"])
    assert "results" not in missing
    assert all(metric["meaning"] for metric in results["metrics"])
    assert own["version"] == "1"
    assert len(results["disturbance"]["foreign_cpu_share_by_round"]) == 3
    assert str(path.parent) not in path.read_text()
    printed = capsys.readouterr()
    assert "transformers: not installed: pip install gguf" in printed.out
    assert f"wrote {path}" in printed.err


def test_a_peer_that_breaks_half_way_is_listed_without_figures(script: Script, path: Path) -> None:
    script.fails_at["llama.cpp"] = "speed1"
    assert run(path, "--runs", "3", "--peers", "llama.cpp") == 0
    _, peer = load_results(path)["engines"]
    assert (peer["status"], peer["reason"]) == ("failed", "failed: it broke")
    assert "results" not in peer
    assert "llama.cpp speed2" not in script.log
    assert "qengine speed2" in script.log


@pytest.mark.parametrize("broken", ["qengine", "llama.cpp"])
def test_a_failure_of_ours_or_a_required_peer_ends_it(
    script: Script, path: Path, broken: str, capsys: pytest.CaptureFixture[str]
) -> None:
    script.fails_at[broken] = "prepare"
    assert run(path, "--require", "llama.cpp") == 1
    assert "error: it broke" in capsys.readouterr().err
    assert not path.exists()


def test_a_required_peer_must_be_there(script: Script, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script.problems["llama.cpp"] = "not installed: pip install it"
    assert run(path, "--require", "llama.cpp") == 2
    assert "llama.cpp is required but not installed: pip install it" in capsys.readouterr().err


def test_ctrl_c(script: Script, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script.interrupt_at = "llama.cpp speed0"
    path.write_text("earlier results")
    assert run(path) == 130
    assert path.read_text() == "earlier results"
    assert "interrupted" in capsys.readouterr().err
    assert script.log[-1] == "qengine closed"


def test_show_prints_an_earlier_file_and_measures_nothing(
    script: Script, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(path, "--peers", "llama.cpp", "--runs", "1")
    first = capsys.readouterr().out
    script.log.clear()
    assert offline.main(["--show", str(path)]) == 0
    assert capsys.readouterr().out == first
    assert offline.main(["--show", str(path), "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("|  | qengine | llama.cpp | ratio |")
    assert script.log == []


def test_quick_is_short_but_explicit_options_win() -> None:
    quick = offline.parse_options(["--quick", "--runs", "2"])
    assert (quick.runs, quick.prompt_tokens, quick.decode_tokens, quick.batch) == (2, 64, 16, (1, 4))
    full = offline.parse_options([])
    assert (full.runs, full.prompt_tokens, full.decode_tokens, full.batch) == (5, 512, 128, (1, 16))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runs", "0"], "argument --runs: '0' is not a whole number of at least 1"),
        (["--threads", "two"], "'two' is not a whole number"),
        (["--batch", "1,0"], "'0' is not a whole number"),
        (["--batch", ""], "'' is not a whole number"),
        (["--peers", "vllm"], "'vllm' is not one of llama.cpp, transformers, or none"),
        (["--require", "vllm"], "invalid choice: 'vllm'"),
        (["--require", "llama.cpp", "--peers", "none"], "--require llama.cpp contradicts --peers none"),
        (["--no-such-option"], "unrecognized arguments"),
    ],
)
def test_wrong_options_exit_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        offline.main(arguments)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_paths_are_checked_before_anything_runs(
    script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert run(tmp_path / "file" / "r.json") == 2
    assert "cannot write" in capsys.readouterr().err
    assert offline.main(["--show", str(tmp_path / "none.json")]) == 2
    assert "cannot read" in capsys.readouterr().err
    assert script.log == []


def test_a_folder_without_llama_cpp(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "r.json", "--llama-cpp", str(tmp_path)) == 2
    assert "no executable llama-bench" in capsys.readouterr().err


def test_tokens_beyond_the_model(script: Script, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(path, "--prompt-tokens", "4096") == 2
    assert "4096 tokens do not fit: the model was made for 4096 positions" in capsys.readouterr().err


def test_a_missing_model(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(path, "--model", str(path.parent / "none.gguf"), "--peers", "none") == 2
    assert "error: no model at" in capsys.readouterr().err
    assert not path.exists()
