"""The GPU benchmark and the tuner on the CPU: interpreted kernels at tiny sizes, and a clock that stands still.

What they measure means nothing here. That every line of them runs does: a GPU's time is too rare for typing errors.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import pytest
import torch

from benchmarks import tune
from benchmarks.gpu import contenders, matmul
from benchmarks.gpu.problems import SHAPES, Shape, Workload
from quant_kernels.tuning.card import KNOWN_CARDS
from quant_kernels.tuning.select import Selector
from quant_kernels.tuning.table import TuningTable

H100 = KNOWN_CARDS["h100"]
TINY = {**SHAPES, "tiny": (Shape("tiny gate_up", 256, 512),)}

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the real thing: make gpu-check")


class StoppedClock:
    """Stands for TimedGraph: calls everything once and always says one microsecond."""

    def __init__(self, calls: Sequence[Callable[[], torch.Tensor]]) -> None:
        assert len(calls) == 2
        for call in calls:
            assert call().isfinite().all()

    def microseconds(self, replays: int = 1) -> list[float]:
        return [1.0] * replays


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
    workload = Workload("tiny", dtype, group, zero, rows=(1, 20, 256), rounds=1)
    records = list(matmul.measure(workload, selector, contenders.contenders(selector, None, None)))
    assert len(records) == 3 * 6
    by_name = {(r["contender"], r["rows"]): r for r in records}
    for rows in workload.rows:
        own = by_name["qengine", rows]
        assert own["status"] == "measured"
        assert own["error"] < 2e-2
        assert own["bytes"] > 256 * 512 / 2
        assert by_name["cuBLAS", rows]["us"] == 1.0
        assert "--marlin" in by_name["Marlin", rows]["why"]
        assert by_name["torch int4", rows]["status"] == "unavailable"
    assert by_name["qengine", 256]["configuration"] == "expand + cuBLAS"


@pytest.mark.usefixtures("on_the_cpu")
def test_the_tuner_runs_every_entrant(capsys: pytest.CaptureFixture[str]) -> None:
    options = argparse.Namespace(
        shapes=["tiny"], dtype=["float16"], group=[128], zero=["const"], rows=[1, 128], limit=1000
    )
    entries = list(tune._measure(options, H100))
    assert [(e["kernel"], e["rows"]) for e in entries] == [("matmul", 16), ("gate_up", 16), ("matmul", 128)]
    assert all(e["microseconds"] == 1.0 for e in entries)
    assert "tiny gate_up" in capsys.readouterr().out
    options.limit = -1
    assert list(tune._measure(options, H100)) == []
