"""The GPU benchmark and the tuner on the CPU: interpreted kernels at tiny sizes, and a clock that stands still.

What they measure means nothing here. That every line of them runs does: a GPU's time is too rare for typing errors.
"""

from __future__ import annotations

import argparse
import gc
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import pytest
import torch

from benchmarks import tune
from benchmarks.gpu import contenders, matmul, timing
from benchmarks.gpu.problems import SHAPES, Shape, Workload
from quant_kernels.compiled.variants import make_scheme
from quant_kernels.linear.p16.layout import P16Weight
from quant_kernels.scheme import ZeroKind
from quant_kernels.tuning.card import KNOWN_CARDS
from quant_kernels.tuning.select import Selector
from quant_kernels.tuning.table import TunedKey, TuningTable
from quant_kernels.tuning.tile import Tile

H100 = KNOWN_CARDS["h100"]
TINY = {**SHAPES, "tiny": (Shape("tiny gate_up", 256, 512),)}

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the real thing: make gpu-check")


class StoppedClock:
    """Stands for TimedGraph: calls everything and always says one microsecond."""

    def __init__(self, calls: Sequence[Callable[[], torch.Tensor]]) -> None:
        assert len(calls) == 2
        for call in calls:
            assert call().isfinite().all()

    def microseconds(self, replays: int = 1) -> list[float]:
        return [1.0] * replays


class FakeGraph:
    """Stands for torch.cuda.CUDAGraph."""

    def replay(self) -> None:
        return


class FakeEvent:
    """Stands for torch.cuda.Event: every interval is half a millisecond."""

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        return

    def synchronize(self) -> None:
        return

    def elapsed_time(self, other: FakeEvent) -> float:
        return 0.5


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("synchronize", lambda: None), ("Stream", lambda: None), ("stream", lambda stream: nullcontext()),
        ("CUDAGraph", FakeGraph), ("graph", lambda graph: nullcontext()), ("Event", FakeEvent),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)


@pytest.mark.usefixtures("fake_cuda")
def test_a_graph_keeps_the_weights_that_it_reads() -> None:
    weight = torch.ones(3)
    alive = weakref.ref(weight)
    graph = timing.TimedGraph([lambda w=weight: w + 1])
    del weight
    gc.collect()
    assert alive() is not None
    del graph
    gc.collect()
    assert alive() is None


@pytest.mark.usefixtures("fake_cuda")
def test_time_is_per_call() -> None:
    # Two calls take half a millisecond, so four rounds fill the two that a replay shall take: eight calls.
    graph = timing.TimedGraph([lambda: torch.ones(1)] * 2)
    assert graph.microseconds(3) == [500 / 8] * 3


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (contenders, matmul, tune):
        monkeypatch.setattr(module, "CUDA", torch.device("cpu"))
    for module in (matmul, tune):
        monkeypatch.setattr(module, "TimedGraph", StoppedClock)
        monkeypatch.setattr(module, "SHAPES", TINY)
    monkeypatch.setattr(contenders, "num_copies", lambda num_bytes, l2_bytes: 2)


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize(("dtype", "zero", "group"), [("float16", "const", 128), ("bfloat16", "integer", 32)])
def test_everyone_takes_part_or_says_why(dtype: str, zero: str, group: int) -> None:
    selector = Selector(H100, TuningTable.empty(H100))
    workload = Workload("tiny", dtype, group, zero, rows=(1, 20, 257), rounds=1)
    records = list(matmul.measure(workload, selector, contenders.contenders(selector, None, None)))
    assert len(records) == 3 * 6
    by_name = {(r["contender"], r["rows"]): r for r in records}
    for rows in workload.rows:
        own = by_name["qengine", rows]
        assert own["status"] == "measured"
        assert own["error"] <= own["error_bound"] < 4e-2
        assert own["bytes"] > 256 * 512 / 2
        assert by_name["cuBLAS", rows]["us"] == 1.0
        assert "--marlin" in by_name["Marlin", rows]["why"]
        assert by_name["torch int4", rows]["status"] == "unavailable"
    assert by_name["qengine", 257]["configuration"] == "expand + cuBLAS"


@pytest.mark.usefixtures("on_the_cpu")
def test_the_tuner_runs_every_entrant(capsys: pytest.CaptureFixture[str]) -> None:
    options = argparse.Namespace(
        shapes=["tiny"], dtype=["float16"], group=[128], zero=["const"], rows=[1, 128], limit=1000
    )
    entries = list(tune._measure(options, H100, set()))
    assert [(e["kernel"], e["rows"]) for e in entries] == [("matmul", 16), ("gate_up", 16), ("matmul", 128)]
    assert all(e["microseconds"] == 1.0 for e in entries)
    assert "tiny gate_up" in capsys.readouterr().out
    known = {tune._key(entry) for entry in entries}
    assert list(tune._measure(options, H100, known)) == []
    scheme = make_scheme(4, 128, ZeroKind.CONST, torch.float16)
    assert TunedKey.of("matmul", scheme, 256, 512, 16) in known
    options.limit = -1
    assert list(tune._measure(options, H100, set())) == []


@pytest.mark.usefixtures("on_the_cpu")
def test_an_entrant_that_does_not_compile_costs_only_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def picky(x: torch.Tensor, weight: P16Weight, tile: Tile, split_k: int) -> torch.Tensor:
        if tile.num_stages != 4:
            raise SyntaxError("the compiler is not amused")
        return real(x, weight, tile, split_k)

    real = tune.matmul
    monkeypatch.setattr(tune, "matmul", picky)
    contest = tune.Contest.on(TINY["tiny"][0], Workload("tiny", "float16", 128, "const"), 16, H100)
    entry = tune.fastest(contest)
    assert entry["tile"].get("num_stages", 4) == 4
    assert "left out: SyntaxError" in capsys.readouterr().out
