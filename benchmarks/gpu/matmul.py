"""One part of the matmul benchmark: every contender on every shape and number of rows of a workload.

Contenders take turns, five rounds of all of them, so that a clock that falls hurts all; each round replays a graph with
cold weights (`timing`). One record per shape, rows and contender: the median, lowest and highest time per call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Spread
from benchmarks.gpu.contenders import CUDA, DTYPES, Case, Contender, contenders, random_weight
from benchmarks.gpu.problems import SHAPES, Shape, Workload
from benchmarks.gpu.timing import TimedGraph
from quant_kernels.linear.p16.prepared import P16Linear
from quant_kernels.reference import linear as reference_linear
from quant_kernels.tolerance import bound, error
from quant_kernels.tuning.select import Selector

REPLAYS_PER_ROUND = 5


def records(spec: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What the GPU's worker answers for a spec, which may name the folders of peers."""
    selector = Selector.of(CUDA)
    folders = (spec.get(name) for name in ("gemlite", "marlin"))
    everyone = contenders(selector, *(None if folder is None else Path(folder) for folder in folders))
    yield from measure(Workload.from_json(spec["workload"]), selector, everyone)


def measure(workload: Workload, selector: Selector, everyone: Sequence[Contender]) -> Iterator[dict[str, Any]]:
    """Records of one workload, shape by shape, as they come."""
    for shape in SHAPES[workload.shapes]:
        case = Case(shape, workload, random_weight(shape, workload), selector.card.l2_bytes)
        own = P16Linear.of(case.record, case.dtype, CUDA, selector)
        for rows in workload.rows:
            x = torch.randn(rows, shape.in_features, dtype=DTYPES[workload.dtype], device=CUDA)
            choice = own.choice(rows)
            scheme = own.weight.scheme
            base = {
                "shape": shape.name,
                "in_features": shape.in_features,
                "out_features": shape.out_features,
                "rows": rows,
                "dtype": workload.dtype,
                "group_size": scheme.group_size,
                "zero": workload.zero,
                "bytes": traffic(shape, rows, own.weight.bytes_per_pass, choice.split_k),
                "flop": 2 * rows * shape.num_weights,
                "configuration": "expand + cuBLAS" if choice.tile is None else choice.tile.name,
                "split_k": choice.split_k,
                "reason": choice.reason,
                **check(own, x, case),
            }
            for name, times in _contest(case, x, everyone):
                yield {**base, "contender": name, **times}
            torch.cuda.empty_cache()


def _contest(case: Case, x: torch.Tensor, everyone: Sequence[Contender]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each contender's times, or the reason why it has none."""
    graphs: dict[str, TimedGraph] = {}
    for contender in everyone:
        reason = contender.unavailable(case, x.shape[0])
        if reason is None:
            try:
                graphs[contender.name] = TimedGraph(contender.calls(case, x))
            except Exception as problem:  # noqa: BLE001  A peer's failure, or a compiler's, ends its turn and no more.
                reason = f"{type(problem).__name__}: {str(problem).splitlines()[0][:160] if str(problem) else ''}"
        if reason is not None:
            yield contender.name, {"status": "unavailable", "why": reason}
    readings: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(case.workload.rounds):
        for name, graph in graphs.items():
            readings[name] += graph.microseconds(REPLAYS_PER_ROUND)
    for name, values in readings.items():
        spread = Spread.of(values)
        yield name, {"status": "measured", "us": spread.median, "us_min": spread.low, "us_max": spread.high}


def traffic(shape: Shape, rows: int, weight_bytes: int, split_k: int) -> int:
    """Bytes that must move: the packed weight, x once, and the result or its partial sums."""
    out = rows * shape.out_features * (2 if split_k == 1 else 4 * split_k)
    return weight_bytes + 2 * rows * shape.in_features + out


def check(own: P16Linear, x: torch.Tensor, case: Case) -> dict[str, float]:
    """The worst error of our result against the reference on the first 16 rows, and what it may be."""
    expected = reference_linear(x[:16], case.record)
    allowed = bound(own.weight.scheme, x.dtype, scale_weight=True)
    # One rounding more where partial sums are added up.
    return {"error": error(own(x)[:16], expected).worst, "error_bound": 2 * allowed.worst}
