"""The CPU kernels against torch, and every instruction set of this processor against plain C.

int8 activations are part of what a linear means here, so results are held against the reference fed with the rounded
rows (float32 sums: a few units of 2^-24 of the sum of absolute products, per chunk of 32 inputs), and against the exact
rows with half a step of the rounding for each input.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from quant_kernels.footprint import native_group
from quant_kernels.linear import cpu_check, dispatch
from quant_kernels.linear.cpu_check import checked_library, is_right
from quant_kernels.linear.cpu_int8 import CpuInt8Linear, can_run, stored_bytes
from quant_kernels.linear.dense import DenseLinear
from quant_kernels.linear.dispatch import Target, choose, prepare
from quant_kernels.native import binding as native
from quant_kernels.native.binding import Library, load
from quant_kernels.native.structures import Level
from quant_kernels.packed_weight import DenseWeight, PackedWeight
from quant_kernels.packing import expand_zeros, unpack_codes
from quant_kernels.reference import dequantize, group_of_row, linear
from quant_kernels.sharding import slice_inputs
from tests.quant_kernels.records import KINDS, in_order, random_record, rounded_row

CPU = torch.device("cpu")
LIBRARY, REASON = load()
needs_library = pytest.mark.skipif(LIBRARY is None, reason=REASON)
#: Two float32 roundings of a product, two of a sum, and those of scales.
ROUNDINGS = 8 * 2.0**-24


def levels() -> list[Level]:
    return [level for level in Level if LIBRARY is not None and level <= LIBRARY.level]


@pytest.fixture(params=levels(), ids=lambda level: level.name)
def library(request: pytest.FixtureRequest) -> Library:
    assert LIBRARY is not None
    return LIBRARY.at(request.param)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def floats(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(x: torch.Tensor, library: Library, *, is_fine: bool = False) -> torch.Tensor:
    """x [M, K] as integers stand for it."""
    return torch.stack([rounded_row(row, library, is_fine=is_fine) for row in x])


def absolute_products(x: torch.Tensor, record: PackedWeight) -> torch.Tensor:
    """The sum of absolute products of x [M, K] in a record's order, where codes and zero points count apart."""
    group = group_of_row(record)
    scales = record.scales.double()[group].abs()
    zeros = record.mins.double()[group].abs() if record.mins is not None else expand_zeros(record)[group] * scales
    return x.abs().double() @ (unpack_codes(record.codes, record.bits) * scales + zeros)


def test_it_is_built_where_there_is_a_compiler() -> None:
    assert LIBRARY is not None or shutil.which("cc") is None, REASON


# Quantizing


@needs_library
@pytest.mark.parametrize("size", [32, 96, 576])
def test_rows_are_rounded_to_the_nearest_step(library: Library, size: int) -> None:
    x = floats(size) * torch.logspace(-6, 3, size)
    q, tables = library.quantize(x)
    scales, sums = tables.unbind(1)
    chunks = x.view(-1, 32)
    expected = chunks.abs().amax(dim=1) / 127
    assert torch.allclose(scales, expected, rtol=2**-23)
    assert q.abs().max() == 127
    # Half a step, and the roundings of the inverse and of the product.
    error = (q.view(-1, 32) * scales.unsqueeze(1) - chunks).abs()
    assert (error <= scales.unsqueeze(1) * (0.5 + 127 * 2**-22)).all()
    assert torch.equal(sums, q.view(-1, 32).float().sum(dim=1))


@needs_library
@pytest.mark.parametrize("size", [32, 96, 576])
def test_fine_rows_have_steps_of_a_254th(library: Library, size: int) -> None:
    x = floats(size) * torch.logspace(-6, 3, size)
    q, tables = library.quantize(x, is_fine=True)
    coarse, _ = library.quantize(x)
    scales, sums = tables.unbind(1)
    assert q.abs().max() == 127 * 254
    assert torch.equal(sums, q.view(-1, 32).float().sum(dim=1))
    assert (in_order(q) - coarse.int() * 254).abs().max() <= 127
    error = (in_order(q).view(-1, 32) * scales.unsqueeze(1) - x.view(-1, 32)).abs()
    assert (error <= scales.unsqueeze(1) * (0.5 + 254 * 127 * 2**-22)).all()


@needs_library
def test_ties_go_to_even_and_zeros_stay(library: Library) -> None:
    x = torch.zeros(64)
    x[:5] = torch.tensor([127.0, 0.5, 1.5, -0.5, -2.5])
    q, tables = library.quantize(x)
    assert q[:5].tolist() == [127, 0, 2, 0, -2]
    assert tables[:, 0].tolist() == [1.0, 0.0]
    assert not q[32:].any()
    fine, tables = library.quantize(x, is_fine=True)
    assert in_order(fine)[:5].tolist() == [127 * 254, 127, 381, -127, -635]
    assert tables[:, 0].tolist() == [torch.tensor(1 / 254).item(), 0.0]


@needs_library
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_makes_its_row_so(library: Library, value: float) -> None:
    record = random_record(64, 20, 32)
    x = floats(3, 64)
    x[1, 40] = value
    y = CpuInt8Linear(record, library).in_float32(x)
    assert not y[1].isfinite().any()
    assert y[[0, 2]].isfinite().all()


# Linears


SHAPES = [(32, 1, 32), (64, 16, 32), (96, 17, 96), (128, 24, 64), (256, 33, 128), (320, 50, 160), (704, 16, 64)]


@needs_library
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("in_features", "out_features", "group_size"), SHAPES)
@pytest.mark.parametrize(("bits", "is_fine"), [(4, False), (4, True), (8, True)])
def test_linears_match_the_reference(
    library: Library, kind: str, in_features: int, out_features: int, group_size: int, bits: int, is_fine: bool
) -> None:
    record = random_record(in_features, out_features, group_size, kind=kind, bits=bits, bias=True)
    prepared = CpuInt8Linear(record, library, is_fine=is_fine)
    assert prepared.bytes_per_pass == stored_bytes(record)
    weight = dequantize(record).double()
    for rows in (1, 2, 3, 4, 5, 11):
        x = floats(rows, in_features, seed=rows)
        got = prepared.in_float32(x).double()
        assert got.shape == (rows, out_features)
        steps = rounded(x, library, is_fine=is_fine)
        exact = steps @ weight + record.bias.double()  # type: ignore[union-attr]
        slack = ROUNDINGS * (in_features / 32 + 8) * (absolute_products(steps, record) + exact.abs())
        assert ((got - exact).abs() <= slack).all()
        half = x.double().view(rows, -1, 32).abs().amax(-1, keepdim=True).expand(-1, -1, 32).reshape(rows, -1) / 254
        half = half / 254 if is_fine else half
        assert ((got - linear(x.double(), record)).abs() <= half * 1.001 @ weight.abs() + slack + 1e-5).all()


@needs_library
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_scales_of_every_type_are_kept(library: Library, scale_dtype: torch.dtype, kind: str) -> None:
    record = random_record(96, 20, 32, kind=kind, scale_dtype=scale_dtype)
    x = floats(2, 96)
    expected = rounded(x, library) @ dequantize(record).double()
    error = (CpuInt8Linear(record, library).in_float32(x) - expected).abs()
    assert (error <= ROUNDINGS * 11 * absolute_products(rounded(x, library), record)).all()


@needs_library
@pytest.mark.parametrize(("bits", "is_fine"), [(4, False), (4, True), (8, True)])
def test_extreme_codes_do_not_overflow(library: Library, bits: int, is_fine: bool) -> None:
    codes = torch.full((64 * bits // 32, 16), -1, dtype=torch.int32)
    record = PackedWeight(bits, codes, torch.ones(2, 16), 32, 64, 16, zero_const=0)
    for sign in (1, -1):
        got = CpuInt8Linear(record, library, is_fine=is_fine).in_float32(torch.full((5, 64), 127.0 * sign))
        expected = torch.full_like(got, sign * 64 * 127 * (2**bits - 1))
        # Fine sums have more bits than float32, and a scale that is no power of two.
        assert torch.allclose(got, expected, rtol=2**-22 if is_fine else 0, atol=0)


@needs_library
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("widths", [(16, 32, 7), (150, 16), (10, 20)])
def test_pieces_are_laid_out_as_the_whole_is(library: Library, kind: str, widths: tuple[int, ...]) -> None:
    record = random_record(96, sum(widths), 32, kind=kind, bias=True)
    pieces = record.codes.split(widths, dim=1)
    bare = replace(record, codes=torch.empty_like(record.codes, device="meta"))
    whole, joined = CpuInt8Linear(record, library), CpuInt8Linear(bare, library, pieces=pieces)
    assert torch.equal(whole.data, joined.data)


@needs_library
def test_an_activation_order_is_followed_and_padding_fed_zeros(library: Library) -> None:
    record = random_record(128, 24, 32, act_order=True)
    x = floats(3, 128)
    plain = random_record(128, 24, 32)
    assert record.perm is not None
    ordered = CpuInt8Linear(plain, library).in_float32(x[:, record.perm.long()])
    assert torch.equal(CpuInt8Linear(record, library).in_float32(x), ordered)
    part = slice_inputs(record, range(40, 96), with_bias=True)
    assert isinstance(part, PackedWeight)
    prepared = CpuInt8Linear(part, library)
    x = floats(3, 56, seed=1)
    error = (prepared.in_float32(x) - linear(x, part)).norm() / linear(x, part).norm()
    assert prepared.in_features == 56
    assert error < 0.01


@needs_library
def test_all_instruction_sets_give_the_same_bits() -> None:
    assert LIBRARY is not None
    assert all(is_right(LIBRARY.at(level)) for level in levels())


@needs_library
@pytest.mark.usefixtures("threads")
def test_a_row_does_not_depend_on_others_or_on_threads(library: Library) -> None:
    prepared = CpuInt8Linear(random_record(576, 200, 32, kind="mins"), library)
    x = floats(300, 576)
    torch.set_num_threads(1)
    alone = torch.cat([prepared.in_float32(row) for row in x.split(1)])
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        assert torch.equal(prepared.in_float32(x), alone)
        assert torch.equal(prepared(x.bfloat16()), prepared.in_float32(x.bfloat16()).bfloat16())


@needs_library
@pytest.mark.usefixtures("threads")
def test_without_torchs_threads_it_makes_its_own(library: Library) -> None:
    prepared = CpuInt8Linear(random_record(64, 200, 32), library)
    x = floats(9, 64)
    expected = prepared(x)
    torch.set_num_threads(3)
    library.functions.qk_set_openmp(None, None)
    try:
        assert torch.equal(prepared(x), expected)
    finally:
        native._borrow_threads(library.functions)
    assert torch.equal(prepared(x), expected)


@needs_library
def test_rows_of_any_length_are_read_to_their_end_and_no_further(library: Library) -> None:
    part = slice_inputs(random_record(128, 24, 32, act_order=True), range(20, 120), with_bias=True)
    assert isinstance(part, PackedWeight)
    prepared = CpuInt8Linear(part, library)
    x = floats(3, 100).bfloat16()
    assert torch.equal(prepared.in_float32(x), prepared.in_float32(x.float()))


@needs_library
def test_the_largest_floats_are_finite(library: Library) -> None:
    q, tables = library.quantize(torch.full((32,), torch.finfo(torch.float32).max))
    assert (q == 127).all()
    assert tables.isfinite().all()


@needs_library
def test_rows_may_lie_apart(library: Library) -> None:
    prepared = CpuInt8Linear(random_record(64, 20, 32), library)
    wide = floats(4, 100)
    assert torch.equal(prepared(wide[:, 3:67]), prepared(wide[:, 3:67].contiguous()))
    assert prepared(torch.empty(0, 64)).shape == (0, 20)
    assert torch.equal(prepared(floats(64, 4).t()), prepared(floats(64, 4).t().contiguous()))


@needs_library
def test_wrong_inputs_are_refused(library: Library) -> None:
    prepared = CpuInt8Linear(random_record(64, 20, 32), library)
    for x in (floats(64), floats(2, 63), floats(2, 64).double(), floats(2, 64).half()):
        with pytest.raises(ValueError, match=r"expected \[rows, 64\] in float32 or bfloat16"):
            prepared(x)
    words, scales = torch.empty(8, 20, dtype=torch.int32), torch.empty(2, 20, dtype=torch.float16)
    blocks = torch.zeros(20, 2, 18, dtype=torch.uint8)
    for wrong in ((blocks[:, :1], words, scales), (blocks[:19], words, scales), (blocks, words.t(), scales)):
        with pytest.raises(ValueError, match=r"rows|blocks"):
            library.unblock(wrong[0], 4, wrong[1], wrong[2], None)
    for x in (floats(30), floats(2, 32), floats(64)[::2], floats(32).double()):
        with pytest.raises(ValueError, match="expected contiguous float32"):
            library.quantize(x)
    with pytest.raises(ValueError, match="16 numbers"):
        library.silu_mul(floats(16), floats(24))


def test_what_cannot_run_is_left_to_others() -> None:
    assert can_run(random_record(64, 16, 32), torch.float32) == (
        False,
        "the CPU's int8 kernels serve bfloat16, not float32",
    )
    assert "non-uniform" in can_run(random_record(64, 16, 32, kind="codebook"), torch.bfloat16)[1]
    assert "split into 32s" in can_run(random_record(64, 16, 16), torch.bfloat16)[1]
    assert native_group(160, 480) == 160
    assert native_group(192, 256) == 64
    assert native_group(-1 % 2**31, 96) == 96


# Between the linears


@needs_library
@pytest.mark.parametrize("size", [8, 64, 576])
def test_norms_match_torch(library: Library, size: int) -> None:
    x, weight = floats(size) * 3, floats(size, seed=1)
    expected = F.rms_norm(x.double(), (size,), weight.double(), 1e-5)
    # Sums of squares in 8 lanes: size / 8 roundings at most, halved by the root.
    assert torch.allclose(library.rms_norm(x, weight, 1e-5).double(), expected, rtol=(size / 8 + 8) * 2**-24, atol=0)


@needs_library
def test_the_gate_matches_torch_where_it_is_steep_and_far(library: Library) -> None:
    gate = torch.cat([torch.linspace(-100, 100, 4000), torch.linspace(-1, 1, 4000)])
    up = floats(8000)
    expected = F.silu(gate.double()) * up.double()
    got = library.silu_mul(gate, up).double()
    # Below -87 e^x is at the end of float32, and the product nothing beside its neighbours.
    assert ((got - expected).abs() <= 8 * 2**-24 * expected.abs() + 1e-35).all()
    assert library.silu_mul(torch.full((8,), float("nan")), up[:8]).isnan().all()


# Choosing


@needs_library
def test_a_target_of_the_cpu_runs_on_them() -> None:
    target = Target.of(CPU, torch.bfloat16)
    record = random_record(64, 16, 32)
    kernel, reason = choose(record, target)
    assert kernel == prepare(record, target).kernel == "cpu_int8"
    assert "int8 kernels" in reason
    assert choose(random_record(64, 16, 16), target)[0] == "dense"
    assert Target.of(CPU, torch.float32).native is None


def test_without_the_library_torchs_kernels_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "_cpu.so"
    monkeypatch.setattr(native, "library_file", lambda: file if file.exists() else None)
    load.cache_clear()
    checked_library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "quant_kernels"):
            target = Target.of(CPU, torch.bfloat16)
            assert choose(random_record(64, 16, 32), target)[0] == "cpu_int4"
        assert "apt install gcc" in caplog.text
        file.write_bytes(b"not a library")
        load.cache_clear()
        assert "cannot be loaded" in load()[1]
    finally:
        load.cache_clear()
        checked_library.cache_clear()


@needs_library
def test_wrong_results_are_found_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu_check, "is_right", lambda library: False)
    checked_library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "quant_kernels"):
            assert dispatch.Target.of(CPU, torch.bfloat16).native is None
        assert "wrong results" in caplog.text
    finally:
        checked_library.cache_clear()


@needs_library
def test_the_check_sees_a_single_wrong_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert LIBRARY is not None
    vectors = LIBRARY.at(LIBRARY.level)
    real = Library.linear

    def wrong(self: Library, *arguments: object) -> torch.Tensor:
        y = real(self, *arguments)  # type: ignore[arg-type]
        if self is vectors:
            y.view(torch.int32)[0, 0] ^= 1
        return y

    monkeypatch.setattr(Library, "linear", wrong)
    assert not is_right(vectors)


# What is not quantized


@needs_library
@pytest.mark.parametrize(("inputs", "outputs"), [(8, 1), (64, 4), (96, 19), (576, 200)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_dense_weights_are_multiplied_in_float32(library: Library, inputs: int, outputs: int, has_bias: bool) -> None:
    weight = floats(outputs, inputs, seed=1).bfloat16()
    bias = floats(outputs, seed=2) if has_bias else None
    for rows in (1, 2, 3, 4, 7, 120):
        x = floats(rows, inputs)
        got = library.dense(weight, bias, x).double()
        exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        # inputs / 8 products and sums in each lane, then three sums.
        slack = (inputs / 8 + 8) * 2**-23 * (x.double().abs() @ weight.double().abs().t() + 1)
        assert ((got - exact).abs() <= slack).all()


@needs_library
@pytest.mark.usefixtures("threads")
def test_a_dense_row_does_not_depend_on_others_or_on_threads(library: Library) -> None:
    prepared = DenseLinear(DenseWeight(floats(70, 2048)), torch.bfloat16, CPU, library)
    x = floats(50, 2048, seed=1).bfloat16()
    torch.set_num_threads(1)
    alone = torch.cat([prepared.in_float32(row) for row in x.split(1)])
    for count in (1, 3):
        torch.set_num_threads(count)
        assert torch.equal(prepared.in_float32(x), alone)
        assert torch.equal(prepared(x), alone.bfloat16())


@needs_library
def test_dense_weights_that_do_not_fit_the_kernel_are_torchs(library: Library) -> None:
    odd = DenseLinear(DenseWeight(floats(5, 20)), torch.bfloat16, CPU, library)
    assert odd(floats(2, 20).bfloat16()).shape == (2, 5)
    whole = DenseLinear(DenseWeight(floats(5, 24)), torch.float32, CPU, library)
    assert torch.equal(whole(floats(2, 24)), F.linear(floats(2, 24), floats(5, 24)))
    weight = floats(5, 24).bfloat16()
    for wrong in ((weight.t(), None, floats(2, 5)), (weight, floats(4), floats(2, 24)), (weight, None, floats(2, 20))):
        with pytest.raises(ValueError, match="expected"):
            library.dense(*wrong)
    assert library.dense(weight, None, floats(0, 24)).shape == (0, 5)
