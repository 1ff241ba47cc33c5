"""What every kernel costs on every card, with no card there: `python -m quant_kernels.resources`.

Shows what each configuration that `tuning` can select takes on every architecture, from its machine code: shared
memory, registers, spills and the main loop's instructions. Exit code 1 if one does not fit its card, spills, or takes
more instructions per weight than its budget: so a change that would make a kernel slow fails where nobody has a GPU.
What has changed is compiled; the rest is known from this machine's cache or the committed record. Of the record's
entries that this machine never compiled, each run compiles some, and one that differs is a failure too. docs/kernels.md
explains the columns. It runs no kernel.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from quant_kernels.compiled.cache import FigureCache
from quant_kernels.compiled.cross_compile import cross_compile
from quant_kernels.compiled.figures import measure
from quant_kernels.compiled.record import RECORD, Record, make_record, read_record, record_text
from quant_kernels.compiled.report import (
    BUDGETS,
    Resources,
    budgets_text,
    issue_share,
    judge,
    lowered_budgets,
    read_budgets,
)
from quant_kernels.compiled.variants import ARCHS, AnyVariant, all_variants
from quant_kernels.tuning.card import KNOWN_CARDS
from quant_kernels.tuning.tile import Tile

DEFAULT_CACHE = Path.home() / ".cache" / "qengine" / "resources"
_INTERRUPTED = 130
_DECODE_TILE = Tile(16, 128).name
#: Entries of the record that are compiled in a run: some twenty seconds on two cores.
_VERIFIED = 32


@dataclass(frozen=True, slots=True)
class Measured:
    """Figures of every variant, in order, and the variants that were compiled on this machine, now or earlier."""

    figures: list[tuple[AnyVariant, dict[str, Any]]]
    compiled: frozenset[AnyVariant]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0; 1 if a configuration exceeds its card or its budget, or the record lacks it or says otherwise; 2 for wrong
        input; 130 after Ctrl-C.
    """
    options = _parse(argv)
    if triton.knobs.runtime.interpret:
        sys.stderr.write("error: TRITON_INTERPRET is set, and an interpreted kernel cannot be compiled; unset it\n")
        return 2
    try:
        return _run(options)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted; what is compiled is kept for the next run\n")
        return _INTERRUPTED


def _run(options: argparse.Namespace) -> int:
    variants = [v for v in all_variants() if v.arch in options.arch and options.only in f"{v.kernel} {v.config}"]
    if not variants:
        raise ValueError(f"no configuration has '{options.only}' in its name; try without --only")
    budgets = read_budgets(options.budgets)
    record = read_record(triton.__version__, options.record)
    cache = FigureCache(options.cache, triton.__version__)
    measured = measure_all(variants, cache, record, verify=options.verify, jobs=options.jobs)
    if options.lower_budgets or options.new_budgets:
        budgets = lowered_budgets(budgets, measured.figures, triton.__version__, add_new=options.new_budgets)
        options.budgets.write_text(budgets_text(budgets), encoding="utf-8")
    rows = [judge(variant, figures, budgets, triton.__version__) for variant, figures in measured.figures]
    problems = _record_problems(record, measured)
    if options.write_record:
        text = record_text(make_record(measured.figures, triton.__version__))
        options.record.write_text(text, encoding="utf-8")
    sys.stdout.write(table_text(rows, everything=options.all))
    sys.stdout.write(_record_summary(record, measured, problems, is_written=options.write_record))
    if budgets.compiler != triton.__version__:
        sys.stdout.write(f"Budgets are for triton {budgets.compiler}; {triton.__version__} may take 15 % more.\n")
    if options.json is not None:
        text = json.dumps([row.to_json() for row in rows], indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
    return 0 if all(row.ok for row in rows) and (options.write_record or not problems) else 1


def measure_all(
    variants: Sequence[AnyVariant], cache: FigureCache, record: Record, *, verify: int | None, jobs: int
) -> Measured:
    """The figures of every variant; compiles what neither cache nor record knows.

    Args:
        verify: how many that only the record knows are compiled all the same; None compiles every variant anew.
    """
    _fill(cache, variants if verify is None else _to_compile(variants, cache, record, verify), jobs)
    known = [(v, cache.get(v) or record.find(v)) for v in variants]
    return Measured(
        [(v, figures) for v, figures in known if figures is not None],
        frozenset(v for v in variants if cache.get(v) is not None),
    )


def _to_compile(variants: Sequence[AnyVariant], cache: FigureCache, record: Record, verify: int) -> list[AnyVariant]:
    unknown = [v for v in variants if cache.get(v) is None]
    recorded = [v for v in unknown if record.find(v) is not None]
    # Another choice every time: what one run leaves out, the next ones find.
    chosen = set(random.sample(recorded, min(verify, len(recorded))))
    return [v for v in unknown if v in chosen or record.find(v) is None]


def _fill(cache: FigureCache, missing: Sequence[AnyVariant], jobs: int) -> None:
    progress = _progress()
    try:
        for done, (variant, figures) in enumerate(_compile(missing, jobs), start=1):
            cache.put(variant, figures)
            progress(done, len(missing))
    finally:
        if missing:
            cache.save()


def _record_problems(record: Record, measured: Measured) -> list[tuple[str, str]]:
    """Entries that are not what this machine compiled, and what is missing; each with what to do."""
    if record.compiler != triton.__version__:
        return []
    differing = [record.difference(v, figures) for v, figures in measured.figures if v in measured.compiled]
    problems = [(line, "find out why, then --verify all --write-record") for line in differing if line]
    missing = sum(record.find(variant) is None for variant, _ in measured.figures)
    if missing:
        problems.append((f"kernels that are not in it as they are now: {missing}", "if they are right, --write-record"))
    return problems


def _record_summary(
    record: Record, measured: Measured, problems: Sequence[tuple[str, str]], *, is_written: bool
) -> str:
    """What was compiled here, what was taken on trust, and what is wrong with the record, or was."""
    text = ""
    if record.compiler != triton.__version__:
        made = f"of triton {record.compiler}" if record.compiler else "missing"
        text += (
            f"The record of figures is {made}: all kernels were compiled on this machine, with {triton.__version__}.\n"
        )
    elif trusted := len(measured.figures) - len(measured.compiled):
        text += (
            f"{len(measured.compiled)} were compiled on this machine; {trusted} have the committed record's figures, "
        )
        text += "as nothing that decides about them has changed.\n"
    if is_written:
        return text + "".join(f"rewritten in the record: {problem}\n" for problem, _ in problems)
    return text + "".join(f"FAILED record: {problem}; {advice}\n" for problem, advice in problems)


def _compile(variants: Sequence[AnyVariant], jobs: int) -> Iterator[tuple[AnyVariant, dict[str, Any]]]:
    if not variants:
        return
    # Triton keeps what it compiles, a megabyte per kernel: here only the figures are wanted.
    folder = tempfile.mkdtemp(prefix="qengine-resources-")
    pool = ProcessPoolExecutor(jobs, initializer=_use_cache, initargs=(folder,))
    try:
        futures = [pool.submit(measure_one, variant) for variant in variants]
        for future in as_completed(futures):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        shutil.rmtree(folder, ignore_errors=True)


def _use_cache(folder: str) -> None:
    """Settings of a process that compiles. Ctrl-C is the parent's to answer: what is begun is finished."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    triton.knobs.cache.dir = folder


def measure_one(variant: AnyVariant) -> tuple[AnyVariant, dict[str, Any]]:
    """Compile one variant and read its figures."""
    kernel, types, constants, options = variant.arguments()
    try:
        compiled = cross_compile(kernel, variant.arch, types, constants, options)
    except Exception as error:
        raise RuntimeError(f"{variant.kernel} {variant.config} does not compile for sm_{variant.arch}") from error
    return variant, measure(variant, compiled)


def table_text(rows: Sequence[Resources], *, everything: bool) -> str:
    """The table: a row per configuration, instructions per weight by architecture; then what is wrong."""
    kinds: dict[tuple[str, str], dict[int, Resources]] = {}
    for row in rows:
        kinds.setdefault((row.kernel, row.config), {})[row.arch] = row
    archs = sorted({row.arch for row in rows})
    header = ["kernel", "configuration", "shared KB", "registers", *(f"sm_{arch}" for arch in archs), "budget"]
    shown = [key for key, of in kinds.items() if everything or not all(r.ok for r in of.values()) or _is_headline(key)]
    lines = [header, *(_line(key, kinds[key], archs) for key in shown)]
    text = _aligned(lines)
    failed = [row for row in rows if not row.ok]
    hidden = len(kinds) - len(shown)
    text += (
        f"\n{len(rows)} compiled kernels of {len(kinds)} configurations; instructions per weight in the main loop.\n"
    )
    if hidden:
        text += f"{hidden} configurations that are within their limits are not shown (--all shows them).\n"
    text += _predictions(rows)
    for row in failed:
        text += "".join(f"FAILED sm_{row.arch} {row.kernel} {row.config}: {problem}\n" for problem in row.problems)
    return text + ("" if failed else "All fit their cards and their budgets; none spills.\n")


def _predictions(rows: Sequence[Resources]) -> str:
    """What the figures mean for cards that are not here."""
    lines = []
    for card in KNOWN_CARDS.values():
        shares = [
            f"{issue_share(card, row):.0%} {dtype}"
            for dtype in ("float16", "bfloat16")
            for row in rows
            if row.arch == card.arch
            and row.kernel == "matmul"
            and row.config == f"w4 {dtype} g128 const {_DECODE_TILE}"
        ]
        if shares:
            lines.append(f"  {card.name:<26} {', '.join(shares)}\n")
    head = "Issue slots that decoding would take at full memory bandwidth (computed from published figures):\n"
    return head + "".join(lines) if lines else ""


def _is_headline(key: tuple[str, str]) -> bool:
    """4-bit float16 weights with the usual group: one line per tile."""
    kernel, config = key
    return kernel in ("matmul", "gate_up") and config.startswith("w4 float16 g128 const") and "odd" not in config


def _line(key: tuple[str, str], of: dict[int, Resources], archs: Sequence[int]) -> list[str]:
    rows = of.values()
    budgets = [row.budget for row in rows if row.budget is not None]
    return [
        *key,
        _range(f"{row.shared_bytes / 1024:.0f}" for row in rows),
        _range(str(row.registers) for row in rows),
        *(_figure(of.get(arch)) for arch in archs),
        f"{max(budgets):.2f}" if budgets else "-",
    ]


def _figure(row: Resources | None) -> str:
    if row is None or row.instr_per_weight is None:
        return "-"
    return f"{row.instr_per_weight:.2f}{'' if row.ok else ' !'}"


def _range(values: Iterable[str]) -> str:
    found = sorted(set(values), key=float)
    return found[0] if len(found) == 1 else f"{found[0]}-{found[-1]}"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ""
    for number, line in enumerate(lines):
        cells = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        text += "  ".join(cells).rstrip() + "\n"
        if number == 0:
            text += "-" * (sum(widths) + 2 * (len(widths) - 1)) + "\n"
    return text


def _progress() -> Callable[[int, int], None]:
    """A line on stderr that counts; in a log, every hundredth."""
    is_terminal = sys.stderr.isatty()

    def report(done: int, total: int) -> None:
        if is_terminal:
            sys.stderr.write(f"\rcompiling kernels: {done} of {total}{chr(10) if done == total else ''}")
            sys.stderr.flush()
        elif done % 100 == 0 or done == total:
            sys.stderr.write(f"compiled {done} of {total} kernels\n")

    return report


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m quant_kernels.resources",
        description="Check what every kernel costs on every card, with none there; what has changed is compiled.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows as JSON")
    parser.add_argument("--all", action="store_true", help="show every configuration, not only the usual ones")
    parser.add_argument("--only", default="", metavar="TEXT", help="only configurations with TEXT in their name")
    parser.add_argument(
        "--arch", type=int, action="append", choices=ARCHS, metavar="CC", help=f"only this one of {ARCHS}; repeatable"
    )
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="processes (default: one per core)"
    )
    parser.add_argument(
        "--cache", type=Path, default=DEFAULT_CACHE, metavar="DIR", help="where figures are kept (%(default)s)"
    )
    parser.add_argument(
        "--record", type=Path, default=RECORD, metavar="FILE", help="the record of figures (the committed one)"
    )
    parser.add_argument(
        "--verify", type=_count, default=_VERIFIED, metavar="N",
        help="compile N of the record's entries that this machine never compiled (default: %(default)s); "
        "all: compile everything again",
    )  # fmt: skip
    parser.add_argument("--write-record", action="store_true", help="write the record from what was measured")
    parser.add_argument(
        "--budgets", type=Path, default=BUDGETS, metavar="FILE", help="the table of budgets (the committed one)"
    )
    parser.add_argument("--lower-budgets", action="store_true", help="lower the committed budgets to what was measured")
    parser.add_argument("--new-budgets", action="store_true", help="the same, and give new configurations a budget")
    options = parser.parse_args(argv)
    options.arch = options.arch or ARCHS
    written = options.lower_budgets or options.new_budgets or options.write_record
    if written and (options.only or options.arch != ARCHS):
        parser.error("budgets and the record are written for all configurations at once; leave --only and --arch out")
    if options.json is not None and (options.json.is_dir() or not options.json.absolute().parent.is_dir()):
        parser.error(f"--json: '{options.json}' cannot be written; give a file in a folder that exists")
    if options.jobs < 1:
        parser.error(f"--jobs is {options.jobs}, expected 1 or more")
    for name, path, known in (("budgets", options.budgets, BUDGETS), ("record", options.record, RECORD)):
        if path != known and not path.is_file() and not (name == "record" and options.write_record):
            parser.error(f"--{name}: no file '{path}'")
    return options


def _count(text: str) -> int | None:
    """A number; None for "all"."""
    if text == "all":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is neither a number nor 'all'")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
