"""What an import really loads, seen from a fresh interpreter: light commands, and an engine without a server."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

_HEAVY = ["torch", "triton", "transformers", "fastapi", "uvicorn", "huggingface_hub", "tokenizers", "numpy"]
#: What some requests or sizes need, and no others.
_NOW_AND_THEN = ["msgspec", "llguidance", "yaml", "h11", "prometheus_client", "opentelemetry", "matplotlib"]
_WEB = ["transformers", "fastapi", "uvicorn", "starlette", "pydantic"]


def _loaded_by(module: str) -> set[str]:
    code = f"import {module}, json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return set(json.loads(done.stdout))


@pytest.mark.parametrize(
    "module", ["qengine", "qengine.config", "qengine.request", "qengine.cli", "qengine.scheduling.scheduler"]
)
def test_light_modules_load_nothing_heavy(module: str) -> None:
    assert _loaded_by(module).isdisjoint(_HEAVY)


@pytest.mark.parametrize("module", ["qengine.engine", "qengine.llm"])
def test_the_engine_loads_no_server(module: str) -> None:
    loaded = _loaded_by(module)
    assert "torch" in loaded
    assert loaded.isdisjoint([*_WEB, *_NOW_AND_THEN])


def test_the_planner_needs_no_torch() -> None:
    assert _loaded_by("qengine.runtime.planner").isdisjoint(["torch", "triton"])


def test_names_of_the_package_come_late() -> None:
    code = "import qengine, sys; a = 'torch' in sys.modules; qengine.SamplingParams; print(a, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["False", "False"]
