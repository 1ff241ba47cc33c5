"""P16Linear and the dispatch: what is chosen, that every way of asking gives the reference's numbers, and real files.

The fixtures are checkpoints that other programs wrote; each of their linears runs through P16 and must give what the
reference gives.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from converters.open import open_checkpoint
from converters.source import LinearSlot
from quant_kernels.elementwise.rms_norm import add_rms_norm
from quant_kernels.elementwise.silu_mul import silu_mul
from quant_kernels.linear.dispatch import P16, Target, checked, choose, prepare
from quant_kernels.linear.p16 import constants as p16_constants
from quant_kernels.linear.p16 import self_test
from quant_kernels.linear.p16.matmul import matmul
from quant_kernels.linear.p16.prepared import P16Linear
from quant_kernels.packed_weight import DenseWeight, PackedWeight
from quant_kernels.packing import concat_outputs, fold_input_order
from quant_kernels.reference import linear
from quant_kernels.scheme import Scheme
from quant_kernels.sharding import slice_inputs
from quant_kernels.tolerance import Error, bound, error
from quant_kernels.tuning.card import KNOWN_CARDS, Card, card_of
from quant_kernels.tuning.select import EXPAND, GATE_UP, MATMUL, Selector
from quant_kernels.tuning.table import TuningTable
from tests.engine.fixtures import NAMES, path
from tests.quant_kernels.records import random_record

DTYPES = (torch.float16, torch.bfloat16)
#: Few multiprocessors, so that the fused kernel and several splits are chosen for shapes of a test's size.
SMALL_CARD = replace(KNOWN_CARDS["3090"], name="small", num_sms=2)


def selector(device: torch.device, card: Card | None = None) -> Selector:
    card = card or (card_of(device) if device.type == "cuda" else KNOWN_CARDS["3090"])
    return Selector(card, TuningTable.empty(card))


def prepared(record: PackedWeight, dtype: torch.dtype, device: torch.device, card: Card | None = None) -> P16Linear:
    made = prepare(record, Target(device, dtype, selector(device, card)))
    assert isinstance(made, P16Linear)
    return made


def check(got: torch.Tensor, expected: torch.Tensor, made: P16Linear, factor: float = 1.0) -> None:
    allowed = bound(made.weight.scheme, got.dtype, scale_weight=True)
    found = error(got.cpu(), expected)
    assert found.within(Error(factor * allowed.worst, factor * allowed.mean)), f"{found} exceeds {allowed}"


def random_x(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("rows", [1, 20, 40])
def test_calling_it_gives_the_finished_result(
    dtype: torch.dtype, act_order: bool, rows: int, device: torch.device
) -> None:
    record = random_record(512, 136, 64, bias=True, act_order=act_order)
    made = prepared(record, dtype, device)
    x = random_x(rows, 512, dtype, device)
    got = made(x)
    assert (got.shape, got.dtype) == ((rows, 136), dtype)
    check(got, linear(x.cpu(), record), made)


@pytest.mark.parametrize("kind", ["const", "zeros", "mins"])
@pytest.mark.parametrize("rows", [1, 40])
def test_a_part_of_an_activation_order_pads_its_inputs_itself(rows: int, kind: str, device: torch.device) -> None:
    record = random_record(512, 136, 128, kind=kind, act_order=True, bias=True)
    for inputs in (range(200), range(200, 512)):
        part = slice_inputs(record, inputs, with_bias=inputs.start == 0)
        made = prepared(part, torch.float16, device)
        assert (made.in_features, made.places) == (len(inputs), None)
        x = random_x(rows, len(inputs), torch.float16, device)
        got = made.partial_sums(x).sum(0).to(x.dtype)
        check(got, linear(x.cpu(), part), made)
        assert torch.equal(made(x), got)


def test_large_m_expands_the_weight(device: torch.device) -> None:
    record = random_record(64, 40, 32, bias=True)
    made = prepared(record, torch.float16, device, KNOWN_CARDS["h100"])
    assert made.choice(257).kernel == EXPAND
    x = random_x(257, 64, torch.float16, device)
    check(made(x), linear(x.cpu(), record), made)


@pytest.mark.parametrize("rows", [1, 257])
def test_the_twin_is_run_whatever_the_regime(rows: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def constants(scheme: Scheme, x: torch.dtype | None = None, *, twin: bool = False) -> dict[str, Any]:
        asked.append(twin)
        return real(scheme, x, twin=twin)

    real = p16_constants.scheme_constants
    monkeypatch.setattr(p16_constants, "scheme_constants", constants)
    monkeypatch.setattr("quant_kernels.linear.p16.expand.scheme_constants", constants)
    record = random_record(64, 40, 32)
    card = KNOWN_CARDS["h100"]
    made = P16Linear.of(record, torch.float16, device, Selector(card, TuningTable.empty(card), twin=True))
    made(random_x(rows, 64, torch.float16, device))
    assert asked
    assert all(asked)


def test_the_choice_of_a_regime_does_not_depend_on_who_came_first(device: torch.device) -> None:
    record = random_record(256, 128, 128)
    for order in ((200, 256), (256, 200)):
        made = prepared(record, torch.float16, device, KNOWN_CARDS["h100"])
        assert {made.choice(rows).kernel for rows in order} == {MATMUL}


def gated(made: P16Linear, x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, by whichever way the card prefers."""
    product = made.try_silu_mul(x)
    return silu_mul(made.partial_sums(x), x.dtype) if product is None else product


@pytest.mark.parametrize("card", [SMALL_CARD, KNOWN_CARDS["4090"]], ids=["fused", "split"])
def test_gate_up_both_ways(card: Card, device: torch.device) -> None:
    record = random_record(512, 256, 128)
    made = prepared(record, torch.float16, device, card)
    x = random_x(3, 512, torch.float16, device)
    gate, up = linear(x.cpu(), record).chunk(2, dim=-1)
    assert (made.try_silu_mul(x) is None) == (card is not SMALL_CARD)
    check(gated(made, x), F.silu(gate) * up, made, factor=3.0)
    fused = made._gate_up_choice(3)
    assert (fused is not None) == (card is SMALL_CARD)
    assert fused is None or fused.kernel == GATE_UP


def test_an_mlp_whose_orders_cost_nothing(device: torch.device) -> None:
    """norm -> gate_up -> down with activation orders on both: one gather in the norm's store, the other folded away."""
    hidden, inner = 128, 256
    gate = random_record(hidden, inner, 32, act_order=True, seed=3)
    up = replace(random_record(hidden, inner, 32, act_order=True, seed=5), perm=gate.perm)
    down = random_record(inner, hidden, 64, act_order=True, seed=4)
    x = random_x(5, hidden, torch.float16, torch.device("cpu"))
    weight = torch.ones(hidden, dtype=torch.float16)
    normed = F.rms_norm(x.float(), (hidden,), weight.float(), 1e-5).half()
    expected = linear((F.silu(linear(normed, gate)) * linear(normed, up)).half(), down)

    folded, parts = fold_input_order(down, [gate, up])
    assert isinstance(folded, PackedWeight)
    assert folded.perm is None
    gate_up = prepared(concat_outputs([p for p in parts if isinstance(p, PackedWeight)]), torch.float16, device)
    assert gate_up.places is not None
    residual = torch.zeros(5, hidden, dtype=torch.float16, device=device)
    ordered = add_rms_norm(x.to(device).unsqueeze(0), residual, weight.to(device), 1e-5, gate_up.places)
    down_made = prepared(folded, torch.float16, device)
    assert down_made.places is None
    sums = down_made.partial_sums(gated(gate_up, ordered))
    assert error(sums.sum(0).cpu(), expected).worst < 2e-2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linears_of_real_files(name: str, dtype: torch.dtype, device: torch.device) -> None:
    source = open_checkpoint(path(name))
    config = source.config
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    has_bias = "qwen2" in name
    heads = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    slots = [
        LinearSlot("model.layers.0.self_attn.q_proj", hidden, hidden, has_bias),
        LinearSlot("model.layers.0.self_attn.k_proj", hidden, heads, has_bias),
        LinearSlot("model.layers.0.self_attn.o_proj", hidden, hidden, False),
        LinearSlot("model.layers.1.mlp.gate_proj", hidden, inner, False),
        LinearSlot("model.layers.1.mlp.down_proj", inner, hidden, False),
    ]
    for slot in slots:
        record = source.read_linear(slot)
        assert isinstance(record, PackedWeight)
        made = prepared(record, dtype, device)
        for rows in (1, 17):
            x = random_x(rows, slot.in_features, dtype, device)
            check(made(x), linear(x.cpu(), record), made)


def test_choices_have_reasons(device: torch.device) -> None:
    record = random_record(512, 128, 128)
    made = prepared(record, torch.float16, device)
    choice = made.choice(1)
    assert choice.kernel == MATMUL
    assert choice is made.choice(16)
    assert "rule" in choice.reason
    target = Target(device, torch.float16, selector(device))
    assert choose(record, target) == (P16, "4-bit codes on Triton's tensor-core kernels")
    assert choose(DenseWeight(torch.zeros(4, 4)), target)[0] == "dense"


@pytest.mark.parametrize(
    ("change", "word"),
    [({"group": 48}, "group size 48"), ({"dtype": torch.float64}, "float64"), ({"arch": 75}, "sm_75")],
)
def test_what_has_no_kernel_runs_dense_with_the_reason(
    change: dict[str, object], word: str, device: torch.device
) -> None:
    record = random_record(96, 32, int(str(change.get("group", 32))))
    dtype = change.get("dtype", torch.float16)
    assert isinstance(dtype, torch.dtype)
    card = replace(KNOWN_CARDS["3090"], arch=int(str(change.get("arch", 86))))
    target = Target(device, dtype, Selector(card, TuningTable.empty(card)))
    kernel, reason = choose(record, target)
    assert kernel == "dense"
    assert word in reason
    assert prepare(record, target).kernel == "dense"


def test_memory_is_counted(device: torch.device) -> None:
    made = prepared(random_record(256, 128, 128, kind="const", act_order=True), torch.float16, device)
    # Words of 4 bits a weight; two rows of scales and one of zeros; the order twice, as it came and inverted.
    assert made.num_bytes == 256 * 128 // 2 + 3 * 128 * 2 + 2 * 256 * 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_self_test_passes(dtype: torch.dtype, device: torch.device) -> None:
    assert self_test.assembly_is_right(device, dtype)
    target = Target(device, dtype, selector(device))
    assert checked(target) is target


def test_wrong_assembly_is_noticed_and_avoided(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: Any, twin: bool = False) -> torch.Tensor:
        return matmul(*arguments, twin=twin) + (0 if twin else 1)

    monkeypatch.setattr(self_test, "matmul", broken)
    target = checked(Target(device, torch.float16, selector(device)))
    assert target.selector is not None
    assert target.selector.twin
    assert "gives wrong results" in caplog.text
    # Where the kernels do not run anyway, nothing is tried.
    old = Target(device, torch.float16, selector(device, replace(KNOWN_CARDS["3090"], arch=75)))
    assert checked(old) is old
    assert checked(Target(device, torch.float32, selector(device))).selector is not None


def test_a_cpu_never_imports_triton() -> None:
    code = (
        "import sys, torch; from quant_kernels.linear.dispatch import Target, prepare;"
        "from tests.quant_kernels.records import random_record;"
        "prepare(random_record(64, 16, 32), Target.of(torch.device('cpu'), torch.bfloat16));"
        "print('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["False"]


def test_without_triton_a_gpu_runs_dense_and_says_so() -> None:
    code = (
        "import sys, torch; sys.modules['triton'] = None;"
        "from quant_kernels.linear.dispatch import Target, choose;"
        "from quant_kernels.tuning.card import KNOWN_CARDS; from quant_kernels.tuning.select import Selector;"
        "from quant_kernels.tuning.table import TuningTable; from tests.quant_kernels.records import random_record;"
        "card = KNOWN_CARDS['4090']; selector = Selector(card, TuningTable.empty(card));"
        "print(choose(random_record(64, 16, 32), Target(torch.device('cpu'), torch.float16, selector)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "triton is not installed" in done.stdout
