"""Writes the tuning table of this machine's GPU: `make tune`, or `python -m benchmarks.tune`.

For every linear of the models in `gpu.problems` and every regime of M it times the tiles and splits that could win,
with cold weights as in the benchmark, and writes the fastest to quant_kernels/tuning/<gpu>.json. What a run measured
replaces what the table said of it; the rest stays. Review the file like code: `python -m quant_kernels.resources
--new-budgets` then shows what the new configurations cost on other cards.

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
from collections.abc import Iterator, Mapping, Sequence
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
    fits = (t for t in found if t.num_stages >= 2 and t.shared_bytes(scheme.bits) <= card.shared_per_block)
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
        kept[TunedKey(**{name: entry[name] for name in TunedKey.__dataclass_fields__})] = entry
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


def fastest(shape: Shape, workload: Workload, rows: int, card: Card) -> dict[str, Any]:
    """The table's entry for one problem: every entrant timed once, the best few again in turns."""
    case = Case(shape, workload, random_weight(shape, workload), card.l2_bytes)
    weight = pack(case.record, case.dtype, CUDA)
    copies = copies_of(weight, case.copies(8 * weight.bytes_per_pass / shape.num_weights))
    x = torch.randn(rows, shape.in_features, dtype=DTYPES[workload.dtype], device=CUDA)
    graphs: dict[Entrant, TimedGraph] = {}
    first: dict[Entrant, float] = {}
    for way in entrants(card, rows, weight):
        graphs[way] = TimedGraph([way.call(copy, x) for copy in copies])
        first[way] = min(graphs[way].microseconds(3))
        for slow in sorted(graphs, key=lambda w: first[w])[_FINALISTS:]:
            del graphs[slow]
    finals: dict[Entrant, list[float]] = {way: [] for way in graphs}
    for _ in range(_FINAL_ROUNDS):
        for way, graph in graphs.items():
            finals[way] += graph.microseconds(5)
    medians = {way: statistics.median(times) for way, times in finals.items()}
    best = min(medians, key=lambda way: medians[way])
    print(f"{shape.name:<14} M {rows:<5} {workload.dtype:<9} {best.name:<32} {medians[best]:8.1f} us", flush=True)
    key = TunedKey.of(MATMUL, weight.scheme, shape.in_features, shape.out_features, rows)
    tile = None if best.tile is None else best.tile.to_json()
    return {**dataclasses.asdict(key), "tile": tile, "split_k": best.split_k, "microseconds": round(medians[best], 2)}


def fused_or_not(
    shape: Shape, workload: Workload, rows: int, card: Card, entry: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """The entry that says whether gate and up are faster in one kernel than as `entry` and silu_mul; if it exists."""
    case = Case(shape, workload, random_weight(shape, workload), card.l2_bytes)
    weight = pack(case.record, case.dtype, CUDA)
    tile = gate_up_tile(rows, weight.scheme)
    if tile is None or entry["tile"] is None or not can_fuse_gate_up(_problem(rows, weight)):
        return
    copies = copies_of(weight, case.copies(8 * weight.bytes_per_pass / shape.num_weights))
    x = torch.randn(rows, shape.in_features, dtype=case.dtype, device=CUDA)
    apart = Entrant(Tile.from_json(entry["tile"]), entry["split_k"])
    tiles: list[Tile | None] = [None, tile, dataclasses.replace(tile, num_stages=tile.num_stages + 1)]
    if rows <= REGIMES[0]:
        tiles += [dataclasses.replace(tile, num_warps=2), Tile(16, 128)]
    graphs = {t: TimedGraph([_mlp_call(c, x, t, apart) for c in copies]) for t in tiles}
    times: dict[Tile | None, list[float]] = {t: [] for t in tiles}
    for _ in range(_FINAL_ROUNDS):
        for t, graph in graphs.items():
            times[t] += graph.microseconds(5)
    best = min(tiles, key=lambda t: statistics.median(times[t]))
    microseconds = statistics.median(times[best])
    name = "two launches" if best is None else f"fused {best.name}"
    print(f"{shape.name:<14} M {rows:<5} {workload.dtype:<9} {name:<32} {microseconds:8.1f} us", flush=True)
    key = TunedKey.of(GATE_UP, weight.scheme, shape.in_features, shape.out_features, rows)
    record = None if best is None else best.to_json()
    yield {**dataclasses.asdict(key), "tile": record, "split_k": 1, "microseconds": round(microseconds, 2)}


def _mlp_call(weight: P16Weight, x: torch.Tensor, tile: Tile | None, apart: Entrant) -> Call:
    """silu(gate) * up, fused by `tile` or as a matmul and a launch of its own."""
    if tile is not None:
        return lambda: gate_up(x, weight, tile)
    multiply = apart.call(weight, x)
    return lambda: silu_mul(multiply(), x.dtype)


def _problem(rows: int, weight: P16Weight) -> Problem:
    return Problem(rows, weight.in_features, weight.out_features, weight.scheme)


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
    entries: list[dict[str, Any]] = []
    interrupted = False
    try:
        for entry in _measure(options, card):
            entries.append(entry)
    except KeyboardInterrupt:
        interrupted = True
    if entries:
        write_text(path, table_text(merge(old, card, entries, command)))
        print(f"{len(entries)} choices written to {path}")
    return _INTERRUPTED if interrupted else 0


def _measure(options: argparse.Namespace, card: Card) -> Iterator[dict[str, Any]]:
    begun = time.monotonic()
    shapes = [shape for name in options.shapes for shape in SHAPES[name]]
    for dtype, group, zero, shape in itertools.product(options.dtype, options.group, options.zero, shapes):
        workload = Workload(options.shapes[0], dtype, group, zero)
        for rows in sorted({regime(m) for m in options.rows}):
            if time.monotonic() - begun > options.limit:
                print(f"{options.limit} s are over; run the rest with fewer --shapes or --rows")
                return
            entry = fastest(shape, workload, rows, card)
            yield entry
            if shape.name.endswith("gate_up"):
                yield from fused_or_not(shape, workload, rows, card, entry)


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
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="DIR", help="where the table goes (%(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
