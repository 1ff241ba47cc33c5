"""What the speed benchmarks' commands share: their options, how results are written, and how they end.

Invariant: a benchmark that is stopped or fails leaves the results file that was there. It measures nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import BenchmarkError, Workload, write_text
from benchmarks.contest import say
from benchmarks.machine import usable_cores
from benchmarks.process import signals_raise

INTERRUPTED = 130


def exit_code_of(run: Callable[[], str]) -> int:
    """Print what `run` returns.

    Returns:
        0; 2 when the input is wrong; 1 when a measurement failed; 130 after Ctrl-C.
    """
    try:
        with signals_raise():
            print(run(), end="")
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED
    return 0


def add_workload_options(parser: argparse.ArgumentParser, full: Mapping[str, Any]) -> None:
    """What is timed, and how often. `full` has the defaults, which `fill_in` sets, for their help."""
    add = parser.add_argument
    batch = ",".join(map(str, full["batch"]))
    add("--batch", type=batches, metavar="N,N", help=f"numbers of sequences to decode at once (default: {batch})")
    prompt, decode = full["prompt_tokens"], full["decode_tokens"]
    add("--prompt-tokens", type=positive, metavar="N", help=f"length of the timed prompt (default: {prompt})")
    add("--decode-tokens", type=positive, metavar="N", help=f"timed decode steps (default: {decode})")
    add("--threads", type=positive, metavar="N", help="CPU threads (default: the physical cores this process may use)")
    add("--runs", type=positive, metavar="N", help=f"rounds; the median counts (default: {full['runs']})")
    add("--quick", action="store_true", help="one short round, to see that everything works; not for figures")
    add("--timeout", type=positive, default=900, metavar="S", help="limit of each process in seconds (default: 900)")


def add_result_options(parser: argparse.ArgumentParser, default: Path) -> None:
    """Where results go, and where earlier ones are."""
    add = parser.add_argument
    add("--json", type=Path, default=default, metavar="PATH", help=f"results file (default: {default})")
    add("--show", type=Path, metavar="RESULTS", help="print an earlier results file and measure nothing")


def fill_in(options: argparse.Namespace, *, full: Mapping[str, Any], short: Mapping[str, Any]) -> None:
    """Set what was not given: with --quick to what is short."""
    for name, value in (short if options.quick else full).items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def workload_of(options: argparse.Namespace) -> Workload:
    """What the options ask for."""
    return Workload(
        threads=options.threads or usable_cores(),
        prompt_tokens=options.prompt_tokens,
        decode_tokens=options.decode_tokens,
        batches=options.batch,
        runs=options.runs,
    )


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write a results file, and say so. Raises InputError."""
    write_text(path, json.dumps(results, indent=2) + "\n")
    say(f"wrote {path}")


def positive(text: str) -> int:
    """An option's value: a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return value


def batches(text: str) -> tuple[int, ...]:
    """An option's value: numbers of sequences, in order."""
    return tuple(sorted({positive(part) for part in text.split(",")}))
