"""Writes the tuning table of this machine's GPU: `make tune`, or `python -m benchmarks.tune`.

For every linear of the models in `gpu.problems` and every regime of M it times the tiles and splits that could win,
with cold weights as in the benchmark, and writes the fastest to quant_kernels/tuning/<gpu>.json. Problems that the
table knows are left as they are unless --fresh is given, so a run that ends early is continued by the next. Review the
file like code: `python -m quant_kernels.resources --new-budgets` then shows what the new configurations cost.

Exit codes: 0; 2 for wrong input or no GPU; 130 after Ctrl-C, with what was measured written.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import BenchmarkError, InputError, write_text
from benchmarks.gpu.contenders import CUDA, DTYPES, Call, Case, copies_of, random_weight
from benchmarks.gpu.problems import SHAPES, Shape, Workload
from benchmarks.gpu.timing import TimedGraph
from benchmarks.machine import environment_record, package_version, publishable
from quant_kernels.elementwise.silu_mul import silu_mul
from quant_kernels.linear.p16.expand import expanded_matmul
from quant_kernels.linear.p16.gate_up import gate_up
from quant_kernels.linear.p16.layout import P16Weight, pack
from quant_kernels.linear.p16.matmul import matmul
from quant_kernels.scheme import Scheme
from quant_kernels.tuning.card import Card, card_of
from quant_kernels.tuning.select import (
    GATE_UP,
    MATMUL,
    MIN_BLOCKS_PER_SPLIT,
    REGIMES,
    SPLITS,
    Problem,
    can_fuse_gate_up,
    gate_up_tile,
    matmul_tiles,
    regime,
)
from quant_kernels.tuning.table import FOLDER, TunedKey, table_path
from quant_kernels.tuning.tile import Tile

DEFAULT_ROWS = (16, 32, 64, 128, 256, 512, 1024)
_INTERRUPTED = 130
#: Entrants that are timed again, in turns, and how often.
_FINALISTS = 4
_FINAL_ROUNDS = 5


def candidates(card: Card, rows: int, scheme: Scheme) -> list[Tile]:
    """Tiles worth timing for a regime: the rule's own and their neighbours, as far as the card holds them."""
    found: dict[Tile, None] = {}
    for tile in matmul_tiles(card.arch, rows, scheme).values():
        for stages in (tile.num_stages - 1, tile.num_stages, tile.num_stages + 1, tile.num_stages + 2):
            found[dataclasses.replace(tile, num_stages=stages)] = None
    if rows <= REGIMES[0]:
        for columns, warps in ((64, 2), (64, 4), (128, 4), (256, 4), (256, 8)):
            found[Tile(16, columns, num_warps=warps)] = None
    elif rows > REGIMES[1]:
        several = scheme.groups > 1
        found[Tile(32, 128, num_stages=3, scale_weight=several)] = None
        found[Tile(32, 256, num_warps=8, num_stages=3, scale_weight=several)] = None
        for columns, warps in ((128, 4), (256, 8)):
            found[Tile(64, columns, 16, warps, scale_weight=True)] = None
    fits = (t for t in found if t.num_stages >= 2 and t.shared_bytes(scheme.bits, card.arch) <= card.shared_per_block)
    return list(fits)


def splits(rows: int, in_features: int, scheme: Scheme) -> list[int]:
    """Splits worth timing: none for tall problems, whose tiles fill the card anyway."""
    if rows > REGIMES[2]:
        return [1]
    blocks = -(-in_features // scheme.block_inputs)
    return [s for s in SPLITS if s == 1 or blocks // s >= MIN_BLOCKS_PER_SPLIT]


def merge(old: Mapping[str, Any] | None, card: Card, new: Sequence[Mapping[str, Any]], command: str) -> dict[str, Any]:
    """The table with what was measured now in place of what it said of the same problems."""
    kept: dict[TunedKey, Mapping[str, Any]] = {}
    for entry in [*(old["choices"] if old else []), *new]:
        kept[_key(entry)] = entry
    order = sorted(kept, key=lambda k: (k.kernel, k.bits, k.dtype, k.group_size, k.zero, k.in_features, k.out_features))
    return {
        "card": card.name,
        "arch": card.arch,
        "command": command,
        "environment": {**environment_record(command), "triton": package_version("triton")},
        "choices": [kept[key] for key in order],
    }


def table_text(table: Mapping[str, Any]) -> str:
    """The table as JSON, one choice a line, so that a change reads as one."""
    head = {k: v for k, v in table.items() if k != "choices"}
    rows = ",\n".join(f"  {json.dumps(choice)}" for choice in table["choices"])
    return json.dumps(head, indent=1)[:-2] + ',\n "choices": [\n' + rows + "\n ]\n}\n"


@dataclasses.dataclass(frozen=True, slots=True)
class Entrant:
    """One way of running a problem. `tile` None expands the weight."""

    tile: Tile | None
    split_k: int

    @property
    def name(self) -> str:
        if self.tile is None:
            return "expand + cuBLAS"
        return self.tile.name + (f", K / {self.split_k}" if self.split_k > 1 else "")

    def call(self, weight: P16Weight, x: torch.Tensor) -> Call:
        """The way on one copy of the weight."""
        tile = self.tile
        if tile is None:
            return lambda: expanded_matmul(x, weight)
        return lambda: matmul(x, weight, tile, self.split_k)


def entrants(card: Card, rows: int, weight: P16Weight) -> list[Entrant]:
    """Everything worth timing for a problem."""
    columns = weight.words.shape[1]
    tiles = [t for t in candidates(card, rows, weight.scheme) if columns % t.block_n == 0]
    ways = [Entrant(t, s) for t in tiles for s in splits(rows, weight.in_features, weight.scheme)]
    return [*ways, *([Entrant(None, 1)] if rows > REGIMES[1] else [])]


@dataclasses.dataclass(frozen=True, slots=True)
class Contest:
    """One weight in enough copies, and x of one height: what entrants are timed on."""

    shape: Shape
    workload: Workload
    rows: int
    card: Card
    x: torch.Tensor
    copies: Sequence[P16Weight]

    @property
    def weight(self) -> P16Weight:
        return self.copies[0]

    @classmethod
    def on(cls, shape: Shape, workload: Workload, rows: int, card: Card) -> Contest:
        """Make the weight and its copies on the device."""
        case = Case(shape, workload, random_weight(shape, workload), card.l2_bytes)
        weight = pack(case.record, case.dtype, CUDA)
        copies = copies_of(weight, case.copies(8 * weight.bytes_per_pass / shape.num_weights))
        x = torch.randn(rows, shape.in_features, dtype=DTYPES[workload.dtype], device=CUDA)
        return cls(shape, workload, rows, card, x, copies)

    def graph(self, way: Callable[[P16Weight, torch.Tensor], Call]) -> TimedGraph | None:
        """A graph of one way of running it, or None (and a line) where that way does not run."""
        try:
            return TimedGraph([way(copy, self.x) for copy in self.copies])
        except Exception as problem:  # noqa: BLE001  A compiler's failure costs one entrant, not the table.
            print(f"  left out: {type(problem).__name__}: {str(problem).splitlines()[:1]}", flush=True)
            return None

    def entry(self, kernel: str, tile: Tile | None, split_k: int, name: str, times: Sequence[float]) -> dict[str, Any]:
        """The table's entry for the winner; says it too."""
        us = statistics.median(times)
        print(f"{self.shape.name:<14} M {self.rows:<5} {self.workload.dtype:<9} {name:<32} {us:8.1f} us", flush=True)
        key = key_of(kernel, self.shape, self.workload, self.rows)
        record = None if tile is None else tile.to_json()
        return {**dataclasses.asdict(key), "tile": record, "split_k": split_k, "microseconds": round(us, 2)}


def key_of(kernel: str, shape: Shape, workload: Workload, rows: int) -> TunedKey:
    """What the table files a problem under."""
    zero = "const" if workload.zero == "const" else "integer"
    sizes = (shape.in_features, shape.out_features, rows)
    return TunedKey(kernel, 4, workload.dtype, workload.group_size, zero, *sizes)


def race(graphs: Mapping[Any, TimedGraph]) -> dict[Any, list[float]]:
    """Microseconds of each, taken in turns."""
    times: dict[Any, list[float]] = {way: [] for way in graphs}
    for _ in range(_FINAL_ROUNDS):
        for way, graph in graphs.items():
            times[way] += graph.microseconds(5)
    return times


def fastest(contest: Contest) -> dict[str, Any]:
    """The entry for a linear: every entrant timed once, the best few again in turns."""
    graphs: dict[Entrant, TimedGraph] = {}
    first: dict[Entrant, float] = {}
    for way in entrants(contest.card, contest.rows, contest.weight):
        graph = contest.graph(way.call)
        if graph is None:
            continue
        graphs[way], first[way] = graph, min(graph.microseconds(3))
        for slow in sorted(graphs, key=lambda w: first[w])[_FINALISTS:]:
            del graphs[slow]
    times = race(graphs)
    best = min(times, key=lambda way: statistics.median(times[way]))
    return contest.entry(MATMUL, best.tile, best.split_k, best.name, times[best])


def fused_or_not(contest: Contest, entry: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The entry that says whether gate and up are faster in one kernel than as `entry` and silu_mul; if it exists."""
    weight = contest.weight
    problem = Problem(contest.rows, weight.in_features, weight.out_features, weight.scheme)
    rule = gate_up_tile(contest.rows, weight.scheme)
    if rule is None or entry["tile"] is None or not can_fuse_gate_up(problem):
        return
    apart = Entrant(Tile.from_json(entry["tile"]), entry["split_k"])
    tiles: list[Tile | None] = [None, rule, dataclasses.replace(rule, num_stages=rule.num_stages + 1)]
    if contest.rows <= REGIMES[0]:
        tiles += [dataclasses.replace(rule, num_warps=2), Tile(16, 128)]
    made = {tile: contest.graph(_mlp(tile, apart)) for tile in tiles}
    times = race({tile: graph for tile, graph in made.items() if graph is not None})
    best = min(times, key=lambda tile: statistics.median(times[tile]))
    yield contest.entry(GATE_UP, best, 1, "two launches" if best is None else f"fused {best.name}", times[best])


def _mlp(tile: Tile | None, apart: Entrant) -> Callable[[P16Weight, torch.Tensor], Call]:
    """silu(gate) * up, fused by `tile` or as a matmul and a launch of its own."""

    def call(weight: P16Weight, x: torch.Tensor) -> Call:
        if tile is not None:
            return lambda: gate_up(x, weight, tile)
        multiply = apart.call(weight, x)
        return lambda: silu_mul(multiply(), x.dtype)

    return call


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit codes are those of the module."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parse(arguments)
    try:
        return _tune(options, shlex.join(["python", "-m", "benchmarks.tune", *publishable(arguments)]))
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _tune(options: argparse.Namespace, command: str) -> int:
    if not torch.cuda.is_available():
        raise InputError("tuning times kernels on an NVIDIA GPU, and torch finds none here; run it where there is one")
    card = card_of(torch.device("cuda"))
    path = table_path(card, options.out)
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    known = set() if options.fresh or old is None else {_key(entry) for entry in old["choices"]}
    entries: list[dict[str, Any]] = []
    try:
        for entry in _measure(options, card, known):
            entries.append(entry)
    except KeyboardInterrupt:
        return _INTERRUPTED
    finally:
        if entries:
            write_text(path, table_text(merge(old, card, entries, command)))
        print(f"{len(entries)} choices written to {path}")
    return 0


def _measure(options: argparse.Namespace, card: Card, known: Container[TunedKey]) -> Iterator[dict[str, Any]]:
    """The entries of all problems that the table does not know yet, as far as the time goes."""
    begun = time.monotonic()
    shapes = [shape for name in options.shapes for shape in SHAPES[name]]
    for dtype, group, zero, shape in itertools.product(options.dtype, options.group, options.zero, shapes):
        workload = Workload(options.shapes[0], dtype, group, zero)
        for rows in sorted({regime(m) for m in options.rows}):
            if key_of(MATMUL, shape, workload, rows) in known:
                continue
            if time.monotonic() - begun > options.limit:
                print(f"{options.limit} s are over; run it again to go on")
                return
            contest = Contest.on(shape, workload, rows, card)
            entry = fastest(contest)
            yield entry
            if shape.name.endswith("gate_up"):
                yield from fused_or_not(contest, entry)


def _key(entry: Mapping[str, Any]) -> TunedKey:
    return TunedKey(**{name: entry[name] for name in TunedKey.__dataclass_fields__})


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune",
        description="Time the kernels' configurations on this machine's NVIDIA GPU and write its tuning table.",
    )
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=["8b", "70b"], help="models (8b 70b)")
    parser.add_argument("--rows", nargs="+", type=int, default=list(DEFAULT_ROWS), metavar="M", help="regimes of M")
    parser.add_argument("--dtype", nargs="+", choices=("float16", "bfloat16"), default=["float16", "bfloat16"])
    parser.add_argument("--group", nargs="+", type=int, default=[128], metavar="G", help="group sizes (128)")
    parser.add_argument("--zero", nargs="+", choices=("const", "integer"), default=["const", "integer"])
    parser.add_argument("--limit", type=int, default=480, metavar="S", help="begin no problem after S seconds (480)")
    parser.add_argument("--fresh", action="store_true", help="time problems again that the table knows")
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="DIR", help="where the table goes (%(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
