"""The quality benchmark: its texts, and what it makes of the commands' answers; the commands are tested elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from benchmarks import quantize_quality
from benchmarks.process import ChildResult


def answer(mean_kl: float) -> str:
    return json.dumps(
        {
            "comparison": {"mean_kl": mean_kl, "p999_kl": 3.0, "top1_agreement": 0.75},
            "model": {"perplexity": 20.0},
            "original": {"perplexity": 15.0},
        }
    )


class Commands:
    """Stands for child processes: remembers them, and makes the folder that `quantize` would."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    def __call__(self, command: Sequence[str], environment: Mapping[str, str], timeout_s: float) -> ChildResult:
        words = list(command)[3:]
        self.seen.append(words)
        if words[0] == "quantize":
            Path(words[2]).mkdir()
            return ChildResult("\ntook 2.5 min, 0.81 GiB of memory (0.78 foreseen)\nwrote it\n", "", 1.0, 0.5, 0)
        return ChildResult(answer(0.2 if "chat" in str(words) else 0.1), "", 1.0, 0.5, 0)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    found = Commands()
    monkeypatch.setattr(quantize_quality, "run_child", found)
    monkeypatch.setattr(quantize_quality, "sample_answers", lambda model, length: [{"messages": []}])
    return found


def test_rows_and_their_table(commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--methods", "rtn", "auto", "--work", str(tmp_path / "w"), "--json", str(tmp_path / "r.json")]
    assert quantize_quality.main(flags) == 0
    record = json.loads((tmp_path / "r.json").read_text())
    assert [(r["method"], r["text"], r["mean_kl"]) for r in record["rows"]] == [
        ("rtn", "technical", 0.1),
        ("rtn", "chat", 0.2),
        ("auto", "technical", 0.1),
        ("auto", "chat", 0.2),
    ]
    first = record["rows"][0]
    assert (first["seconds"], first["peak_gib"], first["foreseen_gib"]) == (150.0, 0.81, 0.78)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert len({len(line) for line in lines}) == 1
    assert "75.0%" in lines[1]


def test_a_second_run_does_nothing_again(commands: Commands, tmp_path: Path) -> None:
    flags = ["--methods", "rtn", "--work", str(tmp_path / "w"), "--json", str(tmp_path / "r.json")]
    for _ in range(2):
        assert quantize_quality.main(flags) == 0
    assert [words[0] for words in commands.seen] == ["quantize", "evaluate", "evaluate"]


def test_the_texts_do_not_overlap() -> None:
    calibration = " ".join(quantize_quality.calibration_texts(12))
    for name in quantize_quality.DOCUMENTED:
        text = quantize_quality.documentation(name)
        assert len(text) > quantize_quality.DOCUMENT_CHARS // 2
        middle = len(text) // 2
        assert text[middle : middle + 60] not in calibration
