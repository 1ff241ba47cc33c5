from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import Workload
from benchmarks.engines import huggingface
from benchmarks.engines.base import Task
from benchmarks.engines.huggingface import HuggingFaceEngine
from benchmarks.process import ChildResult
from tests.benchmarks.records import model_facts

ANSWER = {"prompt": 100.0, "decode": {"1": 10.0, "16": 40.0}, "weight_bytes_per_token": 2200, "kv_bytes_per_token": 8}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The packages that seem to be installed; a test may take some away."""
    names = {"transformers", "accelerate", "gguf"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in names else None)
    return names


def test_what_is_missing_is_said(installed: set[str]) -> None:
    with HuggingFaceEngine() as engine:
        assert engine.problem(model_facts()) is None
        installed.discard("accelerate")
        installed.discard("gguf")
        assert engine.problem(model_facts()) == "not installed: pip install accelerate gguf"
        assert engine.problem(model_facts(path=Path("/models/folder"), quantization=None)) is None


def test_quantized_folders_are_not_run(installed: set[str]) -> None:
    with HuggingFaceEngine() as engine:
        problem = engine.problem(model_facts(path=Path("/models/folder"), quantization="gptq"))
    assert problem is not None
    assert problem.startswith("not run: it reads gptq only with GPU packages")


def test_a_gguf_file_is_converted_once_and_then_used(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    def run_python(_module: str, task: str, spec: dict[str, Any], environment: dict[str, str], _timeout: float) -> Any:
        assert environment["HF_HUB_OFFLINE"] == "1"
        calls.append((task, spec))
        return ANSWER, ChildResult("", "", 2.0, 1.5, 2**20)

    monkeypatch.setattr(huggingface, "run_python", run_python)
    task = Task(model_facts(), Workload(threads=1), dict(os.environ), timeout_s=60)
    with HuggingFaceEngine() as engine:
        engine.prepare(task)
        assert engine.start(task).first_token_s == 1.5
        reading = engine.speed(task, round_number=3)
        (_, convert), (_, start), (_, speed) = calls
        assert convert["path"] == "/models/tiny.gguf"
        assert convert["target"] == start["path"] == speed["path"]
        assert Path(convert["target"]).is_dir()
    assert [name for name, _ in calls] == ["convert", "start", "speed"]
    assert not Path(convert["target"]).exists()
    assert reading.decode == {1: 10.0, 16: 40.0}
    assert speed["round"] == 3
