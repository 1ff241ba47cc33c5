"""Everything that needs a GPU, in one command: `make gpu-check`, or `python -m benchmarks.gpu_check`.

Runs the tests of the kernels on the device, compares whole models with transformers, and measures attention, models end
to end, serving and matmuls, in parts of under eight minutes each; weights are made up, so nothing is downloaded. Writes
benchmarks/results/<gpu>-<date>.json and Markdown tables beside it after every part. Run it again and it goes on where
it stopped; parts that have run on this card with these sources are not repeated. It needs torch, triton, numpy and
pytest, and transformers for parts that run models.

Exit codes: 0 when everything has run and passed; 1 when a test failed or a part broke; 2 for wrong input or no GPU;
75 when time was up and parts are left; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.common import REPOSITORY, BenchmarkError, InputError, check_writable, write_text
from benchmarks.gpu.parts import PART_SECONDS, PARTS, Origin, Part, State, fingerprint
from benchmarks.gpu.report import BENCHMARK, SCHEMA, TABLES, load_results, markdown_report
from benchmarks.machine import environment_record, package_version, publishable

DEFAULT_STATE = REPOSITORY / "build" / "gpu-check"
DEFAULT_RESULTS = REPOSITORY / "benchmarks" / "results"
_LEFT = 75
_INTERRUPTED = 130
_TAIL_LINES = 40
_PEERS = ("gemlite", "marlin")

#: Runs a part and returns its record; tests put their own in its place.
Runner = Callable[[Part, Mapping[str, Any]], dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit codes are those of the module."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parse(arguments)
    try:
        if options.show is not None:
            print(markdown_report(load_results(options.show)), end="")
            return 0
        card = _card()
        check_writable(options.results / "probe.json")
        peers = frozenset(name for name in _PEERS if getattr(options, name) is not None)
        state = State(options.state, Origin(fingerprint(), card["name"], card["versions"], peers))
        return run(options, arguments, card, state, run_part)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted; what has run is kept, run it again to go on", file=sys.stderr)
        return _INTERRUPTED


def run(
    options: argparse.Namespace, arguments: Sequence[str], card: Mapping[str, Any], state: State, runner: Runner
) -> int:
    """Run what is pending, as far as the time goes, and write the results after every part."""
    chosen = [p for p in PARTS if not options.parts or any(name in p.name for name in options.parts)]
    if not chosen:
        known = ", ".join(p.name for p in PARTS)
        raise InputError(f"no part is called {' or '.join(options.parts)}; there are {known}")
    begun = time.monotonic()
    todo = list(chosen) if options.fresh else state.pending(chosen)
    for number, part in enumerate(todo, start=1):
        left = options.limit - (time.monotonic() - begun)
        if number > 1 and part.seconds > left:
            break
        print(f"[{number}/{len(todo)}] {part.name} (about {part.seconds} s)", flush=True)
        folders = {name: getattr(options, name) for name in _PEERS}
        record = runner(part, {name: None if folder is None else str(folder) for name, folder in folders.items()})
        state.save(part, record)
        print(f"        {record['summary']}", flush=True)
        write_results(options.results, arguments, card, state)
    results = write_results(options.results, arguments, card, state)
    print("\n" + markdown_report(results))
    broken = [p.name for p in chosen if (r := state.record_of(p)) is not None and r["status"] != "ok"]
    missing = [p.name for p in chosen if state.record_of(p) is None]
    if missing:
        print(f"{len(missing)} parts are left ({', '.join(missing)}); run it again to go on")
    if broken:
        print(f"failed: {', '.join(broken)}; run it again to repeat them", file=sys.stderr)
        return 1
    return _LEFT if missing else 0


def run_part(part: Part, extras: Mapping[str, Any]) -> dict[str, Any]:
    """Run one part in a process of its own; tests in one for each of the part's runs, side by side."""
    begun = time.monotonic()
    if part.kind == "tests":
        pytest = [sys.executable, "-m", "pytest", "--no-header", "-p", "no:cacheprovider"]
        with ThreadPoolExecutor(len(part.runs)) as side_by_side:
            ends = list(side_by_side.map(_run, ([*pytest, *arguments] for arguments in part.runs)))
        return _test_record(part.runs, ends, round(time.monotonic() - begun, 1))
    workload = None if part.workload is None else part.workload.to_json()
    spec = json.dumps({"kind": part.kind, "workload": workload, **extras})
    end = _run([sys.executable, "-m", "benchmarks.gpu.worker", spec])
    seconds = round(time.monotonic() - begun, 1)
    records = [json.loads(line) for line in end.out.splitlines() if line.startswith("{")]
    summary = f"{len(records)} records in {seconds} s"
    record = {"status": "ok" if end.code == 0 else "failed", "seconds": seconds, "records": records, "summary": summary}
    if end.code != 0:
        record |= {"summary": f"failed after {summary}: {_last_line(end.err)}", "output": _tail(end.err)}
    return record


@dataclass(frozen=True, slots=True)
class _End:
    """How a process ended."""

    code: int
    out: str
    err: str


def _run(command: Sequence[str]) -> _End:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PART_SECONDS, cwd=REPOSITORY)
    except subprocess.TimeoutExpired as late:
        return _End(-1, _text(late.stdout), _text(late.stderr) + f"\nended after {PART_SECONDS} s")
    return _End(done.returncode, done.stdout, done.stderr)


def _test_record(runs: Sequence[Sequence[str]], ends: Sequence[_End], seconds: float) -> dict[str, Any]:
    """The record of a part of tests: one summary where it has one run, else one for each, by its arguments."""
    summaries, outputs, passed = [], [], True
    for arguments, end in zip(runs, ends, strict=True):
        summary = _last_line(end.out) or _last_line(end.err)
        summaries.append(
            summary if len(runs) == 1 else f"{' '.join((Path(arguments[0]).stem, *arguments[1:]))}: {summary}"
        )
        if end.code != 0 or " passed" not in f" {summary}":
            passed = False
            outputs.append(_tail(end.out + end.err))
    record: dict[str, Any] = {"status": "ok" if passed else "failed", "seconds": seconds, "records": []}
    record["summary"] = "; ".join(summaries)
    if not passed:
        record["output"] = "\n".join(outputs)
        print(record["output"], file=sys.stderr)
    return record


def write_results(folder: Path, arguments: Sequence[str], card: Mapping[str, Any], state: State) -> dict[str, Any]:
    """Write everything known of this card and these sources; returns it."""
    records = {p.name: r for p in PARTS if (r := state.record_of(p)) is not None}
    command = shlex.join(["python", "-m", "benchmarks.gpu_check", *publishable(arguments)])
    bandwidth = [m["copy_bytes_per_s"] for r in records.values() if r["kind"] == "bandwidth" for m in r["records"]]
    results = {
        "benchmark": BENCHMARK,
        "schema": SCHEMA,
        "card": dict(card),
        "environment": {**environment_record(command), "triton": package_version("triton")},
        "copy_bytes_per_s": bandwidth[0] if bandwidth else None,
        "tests": [
            {"part": name, "status": r["status"], "summary": r["summary"]}
            for name, r in records.items()
            if r["kind"] == "tests"
        ],
        **{kind: [m for r in records.values() if r["kind"] == kind for m in r["records"]] for kind in TABLES},
        "failed": [{"part": name, "summary": r["summary"]} for name, r in records.items() if r["status"] != "ok"],
        "pending": [p.name for p in PARTS if p.name not in records],
    }
    stem = f"{card['slug']}-{datetime.now(timezone.utc):%Y-%m-%d}"
    write_text(folder / f"{stem}.json", json.dumps(results, indent=1) + "\n")
    write_text(folder / f"{stem}.md", markdown_report(results))
    return results


def _card() -> dict[str, Any]:
    """Facts of the device, asked in a process of its own: this one stays small and never holds the device."""
    code = (
        "import json, torch, triton; from dataclasses import asdict; from quant_kernels.tuning.card import card_of;"
        "card = card_of(torch.device('cuda'));"
        "versions = f'torch {torch.__version__}, triton {triton.__version__}, CUDA {torch.version.cuda}';"
        "print(json.dumps({**asdict(card), 'slug': card.slug, 'versions': versions}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    if done.returncode:
        raise InputError(
            f"no CUDA device can be used ({_last_line(done.stderr)}); this check is for machines with an NVIDIA GPU. "
            "Without one, `make test` checks the kernels as far as a CPU can"
        )
    card: dict[str, Any] = json.loads(done.stdout)
    return {**card, "driver_and_clocks": _driver_and_clocks()}


def _driver_and_clocks() -> str | None:
    """What nvidia-smi says of driver and clocks, or None where it is not there."""
    query = "--query-gpu=driver_version,clocks.max.sm,clocks.sm,clocks.mem,power.limit"
    try:
        done = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True)
    except OSError:
        return None
    return _last_line(done.stdout) or None


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else ""


def _tail(text: str) -> str:
    return "\n".join(text.splitlines()[-_TAIL_LINES:])


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description="Test and measure qengine on this machine's NVIDIA GPU, in parts that can be continued.",
    )
    parser.add_argument("parts", nargs="*", help="only parts with this in their name, e.g. tests or end-to-end")
    parser.add_argument("--list", action="store_true", help="list the parts and stop")
    parser.add_argument(
        "--limit",
        type=int,
        default=480,
        metavar="S",
        help="begin no part that would end later (%(default)s)",
    )
    parser.add_argument("--fresh", action="store_true", help="repeat parts that have run")
    parser.add_argument("--gemlite", type=Path, metavar="DIR", help="folder that holds GemLite's package, as a peer")
    parser.add_argument("--marlin", type=Path, metavar="DIR", help="folder that holds Marlin, built, as a peer")
    parser.add_argument("--results", type=Path, default=DEFAULT_RESULTS, metavar="DIR", help="where results go")
    parser.add_argument(
        "--state", type=Path, default=DEFAULT_STATE, metavar="DIR", help="where finished parts are kept"
    )
    parser.add_argument("--show", type=Path, metavar="FILE", help="print the Markdown of a results file and stop")
    options = parser.parse_args(arguments)
    for name in _PEERS:
        folder = getattr(options, name)
        if folder is not None and not folder.is_dir():
            parser.error(f"--{name}: no folder '{folder}'")
    if options.list:
        for part in PARTS:
            print(f"{part.name:<34} about {part.seconds} s")
        parser.exit()
    return options


if __name__ == "__main__":
    sys.exit(main())
