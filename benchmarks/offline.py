"""Offline speed on the CPU: `python -m benchmarks.offline`.

Decode at several batch sizes, a prompt, process start to first token, and peak memory; ours and each peer that is
installed, taking turns. Invariant: a peer that was not measured is listed with the reason. The parent process measures
nothing itself: every figure comes from a fresh child process, and no child outlives it.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.command import (
    add_result_options,
    add_workload_options,
    exit_code_of,
    fill_in,
    workload_of,
    write_results,
)
from benchmarks.common import InputError, Workload, check_writable
from benchmarks.contest import compete, say
from benchmarks.engines.base import EngineUnderTest, Task
from benchmarks.engines.huggingface import HuggingFaceEngine
from benchmarks.engines.llama_cpp import LlamaCppEngine
from benchmarks.engines.own import OwnEngine, describe_model
from benchmarks.machine import environment_record, publishable
from benchmarks.process import child_environment
from benchmarks.report import (
    BENCHMARK,
    SCHEMA,
    bounds_of,
    load_results,
    markdown_report,
    measured_engines,
    metrics_of,
    terminal_report,
)

DEFAULT_JSON = Path("benchmarks/results/offline-cpu.json")
PEERS = (LlamaCppEngine.name, HuggingFaceEngine.name)
_FULL: Mapping[str, Any] = {"runs": 5, "prompt_tokens": 512, "decode_tokens": 128, "batch": (1, 16)}
_SHORT: Mapping[str, Any] = {"runs": 1, "prompt_tokens": 64, "decode_tokens": 16, "batch": (1, 4)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Returns:
        0; 2 when the input is wrong; 1 when a measurement of ours or of a required peer failed; 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parse_options(arguments)

    def run() -> str:
        results = load_results(options.show) if options.show is not None else _run(options, arguments)
        return markdown_report(results) if options.markdown else terminal_report(results)

    return exit_code_of(run)


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line, with --quick and the defaults filled in. Exits with 2 on a wrong option, as argparse does."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offline", description=(__doc__ or "").split("\n\n")[1])
    add = parser.add_argument
    add("--model", help="folder, .gguf file or hub id (default: the bundled model)")
    add_workload_options(parser, _FULL)
    add("--peers", type=_peers, default=PEERS, metavar="NAME,NAME", help=f"{', '.join(PEERS)}, or none (default: all)")
    add("--require", action="append", default=[], choices=PEERS, help="fail unless this peer is measured; repeatable")
    add("--llama-cpp", type=Path, metavar="FOLDER", help="folder of llama.cpp's binaries (default: searched)")
    add_result_options(parser, DEFAULT_JSON)
    add("--markdown", action="store_true", help="print the README's table instead of the terminal's")
    options = parser.parse_args(arguments)
    fill_in(options, full=_FULL, short=_SHORT)
    unwanted = [name for name in options.require if name not in options.peers]
    if unwanted:
        parser.error(f"--require {unwanted[0]} contradicts --peers {','.join(options.peers) or 'none'}")
    return options


def _peers(text: str) -> tuple[str, ...]:
    names = () if text == "none" else tuple(text.split(","))
    for name in names:
        if name not in PEERS:
            raise argparse.ArgumentTypeError(f"'{name}' is not one of {', '.join(PEERS)}, or none")
    return names


def _run(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Measure, write the JSON, and return its content."""
    check_writable(options.json)
    workload = workload_of(options)
    environment = environment_record(shlex.join(["python", "-m", "benchmarks.offline", *publishable(arguments)]))
    variables = child_environment(workload.threads)
    with ExitStack() as stack:
        engines = [stack.enter_context(engine) for engine in _engines(options)]
        model = describe_model(options.model, variables, options.timeout)
        _check_lengths(workload, model.max_position)
        say(f"{model.name} ({model.description}), {workload.threads} thread(s), {options.runs} round(s)")
        measured = compete(engines, Task(model, workload, variables, options.timeout), options.require)
    results = {
        "schema": SCHEMA,
        "benchmark": BENCHMARK,
        "environment": environment,
        "model": model.to_json(),
        "workload": workload.to_json(),
        "metrics": [asdict(metric) for metric in metrics_of(workload.to_json())],
        **measured,
    }
    for record in measured_engines(results):
        record["bounds"] = bounds_of(record, results)
    write_results(options.json, results)
    return results


def _engines(options: argparse.Namespace) -> list[EngineUnderTest]:
    known: dict[str, Callable[[], EngineUnderTest]] = {
        LlamaCppEngine.name: lambda: LlamaCppEngine(options.llama_cpp),
        HuggingFaceEngine.name: HuggingFaceEngine,
    }
    return [OwnEngine(), *(known[name]() for name in PEERS if name in options.peers)]


def _check_lengths(workload: Workload, max_position: int) -> None:
    longest = max(workload.prompt_tokens, workload.decode_prompt_tokens + workload.decode_tokens)
    # Room for the sampled token, and for sequences that start decoding before the others have read their prompts.
    needed = longest + 128
    if needed > max_position:
        raise InputError(
            f"{longest} tokens do not fit: the model was made for {max_position} positions; use fewer --prompt-tokens "
            "or --decode-tokens"
        )


if __name__ == "__main__":
    sys.exit(main())
