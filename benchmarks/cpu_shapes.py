"""Larger models on the CPU, by shape alone: `python -m benchmarks.cpu_shapes`.

Llama-3.2-1B and Llama-3.1-8B with random weights: ours as GPTQ with groups of 128 (`--load-format dummy`), and a Q4_0
file of the same shape that both our engine and llama.cpp run, taking turns in fresh processes. A GPTQ checkpoint's head
is not quantized, the file's is: so each figure stands beside the most that reading its own weights allows. Invariant:
llama.cpp, where it was not measured, is listed with the reason.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
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
from benchmarks.common import BenchmarkError, InputError, Spread, Workload, check_writable, read_results
from benchmarks.contest import better_of, probe_machine, say
from benchmarks.dummy_gguf import gguf_bytes, write_gguf
from benchmarks.engines.base import EngineUnderTest, SpeedReading, Task
from benchmarks.engines.llama_cpp import LlamaCppEngine
from benchmarks.engines.own import OwnEngine, describe_model
from benchmarks.machine import CpuClock, environment_record, publishable
from benchmarks.process import child_environment
from benchmarks.report import aligned
from benchmarks.synthetic import Sizes

DEFAULT_JSON = Path("benchmarks/results/cpu-shapes.json")
BENCHMARK, SCHEMA = "cpu-shapes", 1
SHAPES: Mapping[str, Sizes] = {
    "1b": Sizes(2048, 8192, 32, 8, 16, vocab_size=128256),
    "8b": Sizes(4096, 14336, 32, 8, 32, vocab_size=128256, is_tied=False),
}
TITLES = {"1b": "Llama-3.2-1B", "8b": "Llama-3.1-8B"}
DUMMY: Mapping[str, Any] = {"load_format": "dummy", "quantization": "gptq", "bits": 4, "group_size": 128}
_FULL: Mapping[str, Any] = {"runs": 5, "prompt_tokens": 256, "decode_tokens": 32, "batch": (1,)}
_SHORT: Mapping[str, Any] = {"runs": 1, "prompt_tokens": 16, "decode_tokens": 4, "batch": (1,)}
#: Positions that a model says it was made for: its cache is then no larger than the timed work needs.
_MAX_POSITION = 2048
_SPARE_POSITIONS = 128


@dataclass(slots=True)
class Contender:
    """An engine with a model, and its readings as they come.

    Attributes:
        weight_bytes: that a decode step reads, where its engine does not tell.
        reason: why it is not measured; None if it is.
    """

    label: str
    engine: EngineUnderTest
    task: Task
    weight_bytes: int | None = None
    reason: str | None = None
    version: str | None = None
    readings: list[SpeedReading] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        record: dict[str, Any] = {"label": self.label, "version": self.version, "reason": self.reason}
        if self.reason is not None:
            return record
        last, batches_timed = self.readings[-1], self.task.workload.batches
        speeds = {f"decode_{b}": [one.decode[b] for one in self.readings] for b in batches_timed}
        speeds["prompt"] = [one.prompt for one in self.readings]
        return {
            **record,
            "weight_bytes_per_step": self.weight_bytes or last.weight_bytes_per_token,
            "kv_bytes_per_token": last.kv_bytes_per_token,
            "results": {name: Spread.of(values).to_json() for name, values in speeds.items()},
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0; 2 when the input is wrong; 1 when a measurement of ours or of a required peer failed; 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parse_options(arguments)

    def run() -> str:
        return report(read_results(options.show, _check) if options.show is not None else _run(options, arguments))

    return exit_code_of(run)


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line, with --quick and the defaults filled in. Exits with 2 on a wrong option, as argparse does."""
    summary = (__doc__ or "").split("\n\n")[1]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_shapes", description=summary)
    add = parser.add_argument
    names = ",".join(SHAPES)
    add("--shapes", type=_shapes, default=tuple(SHAPES), metavar="NAME,NAME", help=f"of {names} (default: all)")
    add_workload_options(parser, _FULL)
    add("--llama-cpp", type=Path, metavar="FOLDER", help="folder of llama.cpp's binaries (default: searched)")
    add("--require", action="append", default=[], choices=[LlamaCppEngine.name], help="fail unless it is measured")
    add("--folder", type=Path, metavar="DIR", help="where the files are written and removed (default: the system's)")
    add_result_options(parser, DEFAULT_JSON)
    options = parser.parse_args(arguments)
    fill_in(options, full=_FULL, short=_SHORT)
    return options


def _shapes(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in SHAPES:
            raise argparse.ArgumentTypeError(f"'{name}' is not one of {', '.join(SHAPES)}")
    return names


def _run(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Measure, write the JSON, and return its content."""
    check_writable(options.json)
    workload = workload_of(options)
    _check_lengths(workload)
    environment = environment_record(shlex.join(["python", "-m", "benchmarks.cpu_shapes", *publishable(arguments)]))
    shapes = [_run_shape(name, workload, options) for name in options.shapes]
    results = {
        "schema": SCHEMA,
        "benchmark": BENCHMARK,
        "environment": environment,
        "workload": workload.to_json(),
        "shapes": shapes,
    }
    write_results(options.json, results)
    return results


def _check_lengths(workload: Workload) -> None:
    longest = max(workload.prompt_tokens, workload.decode_prompt_tokens + workload.decode_tokens)
    most = _MAX_POSITION - _SPARE_POSITIONS
    if longest > most:
        raise InputError(f"{longest} tokens are more than {most}; use fewer --prompt-tokens or --decode-tokens")


def _run_shape(name: str, workload: Workload, options: argparse.Namespace) -> dict[str, Any]:
    """One shape's part of the results; its files are gone afterwards."""
    sizes, title = SHAPES[name], TITLES[name]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cpu-shapes-", dir=options.folder)))
        if shutil.disk_usage(folder).free < 1.1 * gguf_bytes(sizes):
            raise InputError(f"{folder.parent} has no room for {gguf_bytes(sizes) / 1e9:.1f} GB; give another --folder")
        contenders = _contenders(title, sizes, folder, workload, options)
        for contender in contenders:
            stack.enter_context(contender.engine)
        bound = probe_machine(contenders[0].task)
        clock = CpuClock.read()
        _take_turns(contenders, workload.runs, options.require)
        foreign = clock.foreign_share(CpuClock.read())
        return {
            "name": title,
            "sizes": asdict(sizes),
            "bound": better_of(bound, probe_machine(contenders[0].task)),
            "foreign_cpu_share": foreign,
            "engines": [contender.to_json() for contender in contenders],
        }


def _contenders(
    title: str, sizes: Sizes, folder: Path, workload: Workload, options: argparse.Namespace
) -> list[Contender]:
    """Write both models, and say who runs which."""
    say(f"{title}: writing random weights")
    dummy, file = folder / "dummy", folder / "q4_0.gguf"
    dummy.mkdir()
    config = {**sizes.config, "max_position_embeddings": _MAX_POSITION}
    (dummy / "config.json").write_text(json.dumps(config))
    file_bytes = write_gguf(file, sizes, _MAX_POSITION)
    variables = child_environment(workload.threads)

    def task(path: Path, load: Mapping[str, Any] | None = None) -> Task:
        model = describe_model(str(path), variables, options.timeout, load)
        return Task(model, workload, variables, options.timeout)

    of_file = task(file)
    return [
        Contender("qengine, GPTQ group 128", OwnEngine(DUMMY), task(dummy, DUMMY)),
        Contender("qengine, Q4_0", OwnEngine(), of_file),
        Contender("llama.cpp, Q4_0", LlamaCppEngine(options.llama_cpp), of_file, file_bytes),
    ]


def _take_turns(contenders: Sequence[Contender], runs: int, required: Sequence[str]) -> None:
    """As many rounds as asked for. A peer that fails drops out with its reason.

    Raises:
        BenchmarkError: if ours or a required one cannot run or fails.
    """
    for contender in contenders:
        contender.reason = contender.engine.problem(contender.task.model)
        if contender.reason is None:
            contender.version = contender.engine.version()
        elif contender.engine.name in required:
            raise InputError(f"{contender.engine.name} is required but {contender.reason}")
        else:
            say(f"{contender.label}: {contender.reason}")
    for number in range(runs):
        for contender in contenders:
            if contender.reason is None:
                _read(contender, f"round {number + 1}/{runs}", number, required)


def _read(contender: Contender, title: str, number: int, required: Sequence[str]) -> None:
    try:
        reading = contender.engine.speed(contender.task, number)
    except BenchmarkError as error:
        if contender.engine.name in (OwnEngine.name, *required):
            raise
        contender.reason = f"failed: {error}"
        say(f"{contender.label}: {contender.reason}")
        return
    contender.readings.append(reading)
    decode = ", ".join(f"decode {batch}: {speed:.2f}" for batch, speed in reading.decode.items())
    say(f"{title}: {contender.label}: {decode}, prompt: {reading.prompt:.1f} tok/s")


# The table


def report(results: Mapping[str, Any]) -> str:
    """A table of all shapes, with each figure's part of the bound that memory sets."""
    workload = Workload.from_json(results["workload"])
    header = ["shape", "engine", f"prompt {workload.prompt_tokens}"]
    for batch in workload.batches:
        header += [f"decode {batch}", "bound", "of it"]
    rows, notes = [[*header, "GB a step"]], []
    for shape in results["shapes"]:
        for engine in shape["engines"]:
            if engine["reason"] is None:
                rows.append(_row(shape, engine, workload))
            else:
                notes.append(f"{shape['name']}, {engine['label']}: {engine['reason']}")
        notes.append(
            f"{shape['name']}: memory reads {shape['bound']['read_bytes_per_s'] / 1e9:.1f} GB/s; others took "
            f"{shape['foreign_cpu_share']:.0%} of the cores"
        )
    title = (
        f"{results['environment']['cpu']}, {workload.threads} thread(s), median of {workload.runs}; tokens per second\n"
        "bound: what reading a step's weights and cache once at the memory's bandwidth would allow"
    )
    return "\n\n".join((title, aligned(rows), "\n".join(notes))) + "\n"


def _row(shape: Mapping[str, Any], engine: Mapping[str, Any], workload: Workload) -> list[str]:
    medians = {name: spread["median"] for name, spread in engine["results"].items()}
    row = [shape["name"], engine["label"], f"{medians['prompt']:.1f}"]
    for batch in workload.batches:
        most = decode_bound(engine, shape["bound"]["read_bytes_per_s"], workload, batch)
        speed = medians[f"decode_{batch}"]
        row += [f"{speed:.2f}", f"{most:.2f}", f"{speed / most:.0%}"]
    return [*row, f"{engine['weight_bytes_per_step'] / 1e9:.2f}"]


def decode_bound(engine: Mapping[str, Any], bytes_per_s: float, workload: Workload, batch: int) -> float:
    """Tokens per second of `batch` sequences, if a step did nothing but read its weights and their caches once."""
    cache = batch * engine["kv_bytes_per_token"] * workload.mean_decode_context
    return float(batch * bytes_per_s / (engine["weight_bytes_per_step"] + cache))


def _check(record: Any) -> Mapping[str, Any]:
    if not isinstance(record, dict) or (record.get("benchmark"), record.get("schema")) != (BENCHMARK, SCHEMA):
        raise InputError(f"not a results file of {BENCHMARK}, schema {SCHEMA}")
    return record


if __name__ == "__main__":
    sys.exit(main())
