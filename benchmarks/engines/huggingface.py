"""Peer: transformers in bfloat16, of the same weights.

A GGUF file is dequantized once by transformers' own reader and saved as bfloat16 safetensors in a folder of ours, so
that the slow conversion counts neither in its start nor in its memory.

Which packages are needed is asked of importlib's index; nothing of transformers is imported here.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Mapping
from typing import Any

from benchmarks.engines.base import ModelFacts, SpeedReading, StartReading, Task
from benchmarks.engines.own import speed_reading
from benchmarks.machine import package_version
from benchmarks.process import run_python

WORKER = "benchmarks.engines.huggingface_worker"


class HuggingFaceEngine:
    """transformers, eager, with its default attention. It owns a folder for the converted model."""

    name = "transformers"
    label = "transformers bf16"
    meaning: Mapping[str, str] = {
        "decode": "forward passes with a DynamicCache and argmax; no generate() around them, no detokenizing",
        "prompt": "one forward pass, logits of the last token only",
        "start": "tokenizer and bfloat16 safetensors by from_pretrained, generate() of one token from text",
    }

    def __init__(self) -> None:
        self._converted = tempfile.TemporaryDirectory(prefix="bfloat16-model-")

    def __enter__(self) -> HuggingFaceEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self._converted.cleanup()

    def problem(self, model: ModelFacts) -> str | None:
        needed = ["transformers", "accelerate", "gguf"] if model.is_gguf else ["transformers"]
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        if missing:
            return f"not installed: pip install {' '.join(missing)}"
        if not model.is_gguf and model.quantization is not None:
            return f"not run: it reads {model.quantization} only with GPU packages; give a .gguf file"
        return None

    def version(self) -> str:
        return package_version("transformers") or "unknown"

    def prepare(self, task: Task) -> None:
        if task.model.is_gguf:
            spec = {**task.worker_spec(), "target": self._converted.name}
            run_python(WORKER, "convert", spec, _offline(task), task.timeout_s)

    def start(self, task: Task) -> StartReading:
        _, result = run_python(WORKER, "start", self._spec(task), _offline(task), task.timeout_s)
        return StartReading(result.first_output_seconds, result.peak_rss_bytes)

    def speed(self, task: Task, round_number: int) -> SpeedReading:
        spec = {**self._spec(task), "round": round_number}
        record, result = run_python(WORKER, "speed", spec, _offline(task), task.timeout_s)
        return speed_reading(record, result.peak_rss_bytes)

    def _spec(self, task: Task) -> dict[str, Any]:
        path = self._converted.name if task.model.is_gguf else str(task.model.path)
        return {**task.worker_spec(), "path": path}


def _offline(task: Task) -> dict[str, str]:
    return {**task.environment, "HF_HUB_OFFLINE": "1"}
