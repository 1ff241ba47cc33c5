"""Plans of linears: what they say of kernel and bytes is what a prepared linear has, without preparing it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quant_kernels.compiled.prediction import predicted_issue_share
from quant_kernels.compiled.report import read_budgets, share_of_slots
from quant_kernels.linear.dispatch import Target, prepare
from quant_kernels.linear.p16.layout import can_pack, pack
from quant_kernels.linear.plan import launch, plan
from quant_kernels.packed_weight import DenseWeight
from quant_kernels.tuning.card import KNOWN_CARDS
from quant_kernels.tuning.select import EXPAND, GATE_UP, MATMUL, Selector
from quant_kernels.tuning.table import TuningTable
from tests.quant_kernels.records import random_record

CPU = torch.device("cpu")
CARD = KNOWN_CARDS["4090"]
SELECTOR = Selector(CARD, TuningTable.empty(CARD))
#: K, N, group size: whole blocks, blocks and columns that are not full, groups of several blocks, one group.
SIZES = [(256, 256, 128), (288, 200, 32), (192, 136, 64), (768, 128, 256), (576, 64, 192), (320, 144, 320)]


def target(dtype: torch.dtype = torch.float16) -> Target:
    return Target(torch.device("cuda"), dtype, SELECTOR)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["const", "zeros", "mins", "codebook"])
@pytest.mark.parametrize(("rows", "columns", "group"), SIZES)
def test_bytes_on_a_card(rows: int, columns: int, group: int, kind: str, bits: int) -> None:
    record = random_record(rows, columns, group, kind=kind, bits=bits, bias=True, act_order=True)
    planned = plan(record, target())
    if can_pack(record, torch.float16)[0]:
        packed = pack(record, torch.float16, CPU)
        assert planned.kernel == "p16"
        assert planned.bytes_per_pass == packed.bytes_per_pass
        assert planned.scheme == packed.scheme
        assert planned.gathers
    else:
        assert (bits, planned.kernel, planned.is_expanded, planned.gathers) == (8, "dense", True, False)
        assert planned.bytes_per_pass == rows * columns * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["const", "zeros", "mins", "codebook"])
@pytest.mark.parametrize(("rows", "columns", "group"), [*SIZES, (128, 24, 8)])
def test_kernel_and_bytes_on_a_cpu(
    rows: int, columns: int, group: int, kind: str, bits: int, dtype: torch.dtype
) -> None:
    record = random_record(rows, columns, group, kind=kind, bits=bits, act_order=True)
    planned = plan(record, Target(CPU, dtype))
    linear = prepare(record, Target(CPU, dtype))
    assert (planned.kernel, planned.bytes_per_pass) == (linear.kernel, linear.bytes_per_pass)
    assert planned.is_expanded == (linear.kernel == "dense")
    assert planned.is_expanded == planned.reason.startswith("expanded at load: ")


def test_a_dense_weight_is_not_expanded() -> None:
    weight = DenseWeight(torch.zeros(48, 32), torch.zeros(48))
    planned = plan(weight, Target(CPU, torch.bfloat16))
    assert planned.bytes_per_pass == prepare(weight, Target(CPU, torch.bfloat16)).bytes_per_pass == 48 * 32 * 2
    assert (planned.format, planned.is_expanded) == ("bfloat16", False)


def test_codes_are_not_looked_at() -> None:
    record = random_record(256, 128, 64, kind="mins", act_order=True)
    empty = replace(record, codes=record.codes.to("meta"))
    for where in (target(), Target(CPU, torch.bfloat16), Target(CPU, torch.float32)):
        assert plan(empty, where) == plan(record, where)


@pytest.mark.parametrize(
    ("kind", "group", "text"),
    [("const", 64, "w4 g64"), ("zeros", 256, "w4 gK asym"), ("mins", 32, "w4 g32 mins")],
)
def test_formats(kind: str, group: int, text: str) -> None:
    assert plan(random_record(256, 128, group, kind=kind), target()).format == text


def test_what_a_card_launches() -> None:
    wide = plan(random_record(256, 2 * 128 * 128, 128, kind="const"), target())
    fused = launch(wide, SELECTOR, 1, is_gate_up=True)
    alone = launch(wide, SELECTOR, 1)
    many = launch(wide, SELECTOR, 5000)
    assert fused is not None
    assert alone is not None
    assert many is not None
    assert (fused.kernel, alone.kernel, many.kernel) == (GATE_UP, MATMUL, EXPAND)
    assert launch(wide, None, 1) is None
    assert launch(plan(DenseWeight(torch.zeros(8, 8)), target()), SELECTOR, 1) is None


@pytest.mark.parametrize("name", KNOWN_CARDS)
def test_predicted_issue_slots(name: str) -> None:
    """The same figure as `python -m quant_kernels.resources` prints, but for the rows of zeros at the tables' ends."""
    card = KNOWN_CARDS[name]
    planned = plan(random_record(8192, 1024, 128, kind="const"), target())
    assert planned.scheme is not None
    choice = launch(planned, Selector(card, TuningTable.empty(card)), 1)
    assert choice is not None
    assert choice.tile is not None
    share = predicted_issue_share(choice, planned.scheme, card, planned.bytes_per_weight)
    budget = read_budgets().rows[f"matmul w4 float16 g128 const {choice.tile.name}"][str(card.arch)]
    assert share == pytest.approx(share_of_slots(card, budget, 0.5 + 2 / 128), rel=1e-3)
    # Scales in the other 16-bit type are predicted as their own are; a card without a clock is not predicted.
    mixed = replace(planned.scheme, dtype=torch.bfloat16)
    assert predicted_issue_share(choice, mixed, card, planned.bytes_per_weight) is not None
    assert predicted_issue_share(choice, planned.scheme, replace(card, clock_hz=0.0), 0.5) is None
