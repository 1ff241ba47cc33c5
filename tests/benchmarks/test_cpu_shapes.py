"""Shapes on the CPU: the command from end to end on a tiny one, and what is made of readings."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cpu_shapes
from benchmarks.common import BenchmarkError, Workload
from benchmarks.dummy_gguf import gguf_bytes, write_gguf
from benchmarks.engines import own_worker
from benchmarks.engines.base import ModelFacts, SpeedReading, Task
from benchmarks.engines.llama_cpp import LlamaCppEngine
from benchmarks.engines.own import OwnEngine
from benchmarks.synthetic import Sizes
from qengine import LLM, SamplingParams
from qengine.config import LoadConfig
from qengine.runtime.inspection import inspect_model
from qengine.runtime.loader import open_model
from quant_kernels.linear.dispatch import Target
from tests.benchmarks.stand_ins import write_binaries

TINY = Sizes(128, 256, 4, 2, 2, vocab_size=320)
BOUND = {"read_bytes_per_s": 1e9, "matmul_flop_per_s": {"bfloat16": 1e9}}


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_file_loads_and_answers(tmp_path: Path, is_tied: bool) -> None:
    sizes = Sizes(128, 256, 4, 2, 2, vocab_size=320, is_tied=is_tied)
    path = tmp_path / "q4_0.gguf"
    num_read = write_gguf(path, sizes, 256)
    opened = open_model(LoadConfig(model=str(path)))
    assert (opened.tied, opened.config.vocab_size, opened.config.max_position) == (is_tied, 320, 256)
    kv, hidden, inner = 64, 128, 256
    layer = 2 * hidden * hidden + 2 * kv * hidden + 3 * hidden * inner
    # 4.5 bits a weight; norms in float32.
    norms = (2 * 2 + 1) * hidden * 4
    assert num_read == (2 * layer + 320 * hidden) * 18 // 32 + norms
    assert gguf_bytes(sizes) == (2 * layer + (1 if is_tied else 2) * 320 * hidden) * 18 // 32
    assert gguf_bytes(sizes) < path.stat().st_size
    with LLM(str(path), max_model_len=64) as llm:
        params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
        [output] = llm.generate("ab", params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 4


@pytest.fixture
def binaries(tmp_path: Path) -> Path:
    return write_binaries(tmp_path / "bin")


def describe_here(
    model: str, environment: Mapping[str, str], timeout_s: float, options: Mapping[str, Any] | None
) -> ModelFacts:
    """What a worker would answer, without the seconds that a process takes to start."""
    channel = io.StringIO()
    own_worker.describe({"model": model, "options": dict(options or {})}, channel)
    record = json.loads(channel.getvalue())
    return ModelFacts(**{**record, "path": Path(record["path"])})


@pytest.fixture(autouse=True)
def _tiny_and_without_a_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_shapes, "SHAPES", {"1b": TINY})
    monkeypatch.setattr(cpu_shapes, "probe_machine", lambda task: BOUND)
    monkeypatch.setattr(cpu_shapes, "describe_model", describe_here)


class Script:
    """Engines that answer at once; `fails_at` is the round in which llama.cpp breaks."""

    def __init__(self) -> None:
        self.fails_at: int | None = None

    def own(self, engine: OwnEngine, task: Task, number: int) -> SpeedReading:
        return SpeedReading(100.0 + number, {b: 10.0 * b for b in task.workload.batches}, 1000, 8, 1)

    def peer(self, engine: LlamaCppEngine, task: Task, number: int) -> SpeedReading:
        if self.fails_at == number:
            raise BenchmarkError("it broke")
        return SpeedReading(50.0, {b: 5.0 * b for b in task.workload.batches}, None, 8, 1)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    script = Script()
    monkeypatch.setattr(OwnEngine, "speed", lambda engine, task, number: script.own(engine, task, number))
    monkeypatch.setattr(LlamaCppEngine, "speed", lambda engine, task, number: script.peer(engine, task, number))
    return script


def run(tmp_path: Path, *words: str) -> tuple[int, dict[str, Any]]:
    found = tmp_path / "out.json"
    code = cpu_shapes.main(["--shapes", "1b", "--json", str(found), "--folder", str(tmp_path), *words])
    return code, json.loads(found.read_text()) if found.exists() else {}


def by_label(results: Mapping[str, Any]) -> dict[str, Any]:
    return {engine["label"]: engine for engine in results["shapes"][0]["engines"]}


def test_results_and_table(tmp_path: Path, binaries: Path, script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    code, results = run(tmp_path, "--llama-cpp", str(binaries), "--runs", "3", "--batch", "1,4", "--threads", "1")
    assert code == 0
    engines = by_label(results)
    assert list(engines) == ["qengine, GPTQ group 128", "qengine, Q4_0", "llama.cpp, Q4_0"]
    assert engines["qengine, Q4_0"]["results"]["prompt"] == {
        "median": 101.0,
        "min": 100.0,
        "max": 102.0,
        "values": [100.0, 101.0, 102.0],
    }
    norms = 5 * 128 * 4
    assert engines["llama.cpp, Q4_0"]["weight_bytes_per_step"] == gguf_bytes(TINY) + norms
    assert engines["qengine, Q4_0"]["weight_bytes_per_step"] == 1000
    table = capsys.readouterr().out
    assert cpu_shapes.main(["--show", str(tmp_path / "out.json")]) == 0
    assert capsys.readouterr().out == table
    assert [line.split()[0] for line in table.splitlines() if "Q4_0" in line] == ["Llama-3.2-1B"] * 2
    assert not list(tmp_path.glob("cpu-shapes-*"))


def test_the_bound_by_hand() -> None:
    engine = {"weight_bytes_per_step": 1000, "kv_bytes_per_token": 10}
    workload = Workload(threads=1, decode_tokens=9)
    # 32 tokens of the prompt, and 5 of 9 decoded ones on average: 370 bytes of cache for each sequence.
    assert cpu_shapes.decode_bound(engine, 1370.0, workload, 1) == 1
    assert cpu_shapes.decode_bound(engine, 1740.0, workload, 2) == 2


def test_a_peer_that_fails_is_listed_with_the_reason(
    tmp_path: Path, binaries: Path, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    script.fails_at = 1
    words = ("--llama-cpp", str(binaries), "--runs", "2", "--threads", "1")
    code, results = run(tmp_path, *words)
    assert code == 0
    assert by_label(results)["llama.cpp, Q4_0"]["reason"] == "failed: it broke"
    assert "Llama-3.2-1B, llama.cpp, Q4_0: failed: it broke" in capsys.readouterr().out
    (tmp_path / "out.json").unlink()
    assert run(tmp_path, *words, "--require", "llama.cpp") == (1, {})
    assert not list(tmp_path.glob("cpu-shapes-*"))


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--prompt-tokens", "4000") == (2, {})
    assert "4000 tokens are more than 1920" in capsys.readouterr().err
    other = tmp_path / "other.json"
    other.write_text("{}")
    assert cpu_shapes.main(["--show", str(other)]) == 2
    assert "not a results file of cpu-shapes" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cpu_shapes.parse_options(["--shapes", "70b"])
    assert "'70b' is not one of 1b" in capsys.readouterr().err


def test_real_processes_on_a_tiny_shape(tmp_path: Path, binaries: Path) -> None:
    """Both of ours through the worker; llama.cpp's binaries are stand-ins."""
    code, results = run(tmp_path, "--llama-cpp", str(binaries), "--quick", "--threads", "1")
    assert code == 0
    engines = by_label(results)
    assert engines["llama.cpp, Q4_0"]["results"]["decode_1"]["median"] == 130.5
    for label in ("qengine, GPTQ group 128", "qengine, Q4_0"):
        assert engines[label]["results"]["decode_1"]["median"] > 0
    config = tmp_path / "config.json"
    config.write_text(json.dumps(TINY.config))
    opened = open_model(LoadConfig(model=str(tmp_path), **cpu_shapes.DUMMY))
    expected = inspect_model(opened, Target.of(torch.device("cpu"), torch.bfloat16)).num_bytes
    assert engines["qengine, GPTQ group 128"]["weight_bytes_per_step"] == expected
