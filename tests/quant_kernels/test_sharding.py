"""Cut weights are lossless: parts side by side, or added up, are the whole, bit for bit, and kernels run them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant_kernels.linear.dispatch import Target, prepare
from quant_kernels.linear.order import InputOrder
from quant_kernels.linear.plan import plan
from quant_kernels.packed_weight import PADDING, DenseWeight, PackedWeight
from quant_kernels.packing import unpack_codes
from quant_kernels.reference import linear
from quant_kernels.sharding import slice_inputs, slice_outputs
from tests.quant_kernels.records import random_record

CPU = torch.device("cpu")


def dequantized(weight: PackedWeight | DenseWeight) -> torch.Tensor:
    """float64 [inputs, N] by the definition of the record, row by row, and independent of the reference's indexing."""
    if isinstance(weight, DenseWeight):
        return weight.weight.double().t()
    codes = unpack_codes(weight.codes, weight.bits)
    perm = list(range(weight.in_features)) if weight.perm is None else weight.perm.tolist()
    rows: dict[int, torch.Tensor] = {}
    for row, natural in enumerate(perm):
        group = row // weight.group_size
        code, scale = codes[row].double(), weight.scales[group].double()
        if weight.mins is not None:
            value = code * scale + weight.mins[group].double()
        elif weight.codebook is not None:
            value = weight.codebook.double()[codes[row].long()] * scale
        else:
            zeros = weight.zero_const if weight.zeros is None else weight.zeros[group].double()
            assert zeros is not None
            value = (code - zeros) * scale
        if natural >= 0:
            assert natural not in rows, "an input has one row"
            rows[natural] = value
    return torch.stack([rows[i] for i in range(len(rows))])


def cuts(total: int, inner: Sequence[int]) -> list[range]:
    return [range(a, b) for a, b in pairwise([0, *sorted(inner), total])]


def parts_by_inputs(weight: PackedWeight | DenseWeight, ranges: Sequence[range]) -> list[PackedWeight | DenseWeight]:
    return [slice_inputs(weight, r, with_bias=i == 0) for i, r in enumerate(ranges)]


KINDS = ("const", "zeros", "mins", "codebook")


@settings(deadline=None, max_examples=150)
@given(
    kind=st.sampled_from(KINDS),
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([16, 32, 64, 128, 10_000]),
    words=st.integers(2, 40),
    act_order=st.booleans(),
    data=st.data(),
)
def test_any_cut_is_lossless(
    kind: str, bits: int, group_size: int, words: int, act_order: bool, data: st.DataObject
) -> None:
    rows = words * 8
    record = random_record(
        rows, 9, min(group_size, rows), kind=kind, bits=bits, act_order=act_order, bias=True, seed=words
    )
    whole = dequantized(record)
    inner = data.draw(st.lists(st.integers(1, rows - 1), max_size=3, unique=True))
    parts = parts_by_inputs(record, cuts(rows, inner))
    assert torch.equal(torch.cat([dequantized(p) for p in parts]), whole)
    assert [p.bias is not None for p in parts] == [True, *[False] * (len(parts) - 1)]
    columns = cuts(9, data.draw(st.lists(st.integers(1, 8), max_size=3, unique=True)))
    sides = [slice_outputs(record, c) for c in columns]
    assert torch.equal(torch.cat([dequantized(p) for p in sides], dim=1), whole)
    assert record.bias is not None
    assert torch.equal(torch.cat([p.bias for p in sides if p.bias is not None]), record.bias)


@pytest.mark.parametrize(("groups", "group_size"), [(231, 32), (107, 32), (231, 128), (107, 64), (12, 128)])
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_groups_that_do_not_halve(groups: int, group_size: int, num_ranks: int) -> None:
    record = random_record(groups * group_size, 8, group_size)
    stops = [group_size * (groups * (i + 1) // num_ranks) for i in range(num_ranks - 1)]
    parts = parts_by_inputs(record, cuts(record.in_features, stops))
    assert all(isinstance(p, PackedWeight) and p.perm is None and p.group_size == group_size for p in parts)
    assert torch.equal(torch.cat([dequantized(p) for p in parts]), dequantized(record))


def test_a_cut_within_a_group_repeats_its_scales() -> None:
    record = random_record(896, 8, 128)  # Qwen2.5-0.5B's o_proj: seven groups, seven heads of 64 for each of two.
    first, second = parts_by_inputs(record, cuts(896, [448]))
    assert isinstance(first, PackedWeight)
    assert isinstance(second, PackedWeight)
    assert (first.group_size, first.num_groups) == (128, 4)
    assert (second.group_size, second.num_groups) == (64, 7)
    assert torch.equal(second.scales[0], record.scales[3])
    assert torch.equal(second.scales[1], second.scales[2])
    assert second.perm is None


def test_a_single_group_is_everybodys() -> None:
    record = random_record(256, 8, 256)
    for part in parts_by_inputs(record, cuts(256, [96])):
        assert isinstance(part, PackedWeight)
        assert part.group_size == part.in_features
        assert torch.equal(part.scales, record.scales)


def test_activation_order_pads_groups_to_chunks() -> None:
    record = random_record(256, 8, 64, act_order=True, seed=5)
    assert record.perm is not None
    for part, inputs in zip(parts_by_inputs(record, cuts(256, [100])), cuts(256, [100]), strict=True):
        assert isinstance(part, PackedWeight)
        assert part.perm is not None
        assert part.group_size == 32
        assert part.num_inputs == len(inputs)
        kept = [[p for p in group if p in inputs] for group in record.perm.view(4, 64).tolist()]
        assert part.in_features == sum(-(-len(group) // 32) * 32 for group in kept)
        assert [p + inputs.start for p in part.perm.tolist() if p >= 0] == [p for group in kept for p in group]


def test_a_group_without_local_rows_costs_nothing() -> None:
    record = random_record(128, 8, 32, act_order=True)
    perm = torch.cat([torch.randperm(64), 64 + torch.randperm(64)]).int()
    assert record.perm is not None
    record.perm.copy_(perm)
    part = slice_inputs(record, range(64), with_bias=False)
    assert isinstance(part, PackedWeight)
    assert (part.in_features, part.num_groups) == (64, 2)


def test_parts_of_parts() -> None:
    record = random_record(256, 8, 64, act_order=True, seed=3)
    half = slice_inputs(record, range(128, 256), with_bias=False)
    parts = [slice_inputs(half, r, with_bias=False) for r in (range(40), range(40, 128))]
    assert torch.equal(torch.cat([dequantized(p) for p in parts]), dequantized(record)[128:])


def test_dense_parts() -> None:
    weight = DenseWeight(torch.randn(6, 10), torch.randn(6))
    rows = [slice_outputs(weight, r) for r in (range(4), range(4, 6))]
    assert torch.equal(torch.cat([r.weight for r in rows if isinstance(r, DenseWeight)]), weight.weight)
    columns = parts_by_inputs(weight, [range(3), range(3, 10)])
    assert torch.equal(torch.cat([c.weight for c in columns if isinstance(c, DenseWeight)], dim=1), weight.weight)
    assert columns[0].bias is weight.bias
    assert columns[1].bias is None


def test_the_whole_is_not_copied() -> None:
    record, dense = random_record(64, 8, 32), DenseWeight(torch.randn(6, 10))
    assert slice_outputs(record, range(8)) is record
    part = slice_inputs(record, range(64), with_bias=True)
    assert isinstance(part, PackedWeight)
    assert part.codes is record.codes
    whole = slice_inputs(dense, range(10), with_bias=True)
    assert isinstance(whole, DenseWeight)
    assert whole.weight is dense.weight


def test_a_part_holds_no_memory_of_the_whole() -> None:
    record, dense = random_record(128, 64, 32), DenseWeight(torch.randn(64, 128))
    pieces: list[torch.Tensor] = []
    for cut in (slice_outputs, lambda w, r: slice_inputs(w, r, with_bias=True)):
        packed, plain = cut(record, range(32)), cut(dense, range(32))
        pieces += [packed.codes, packed.scales, packed.zeros, plain.weight]
    for piece in pieces:
        assert piece.untyped_storage().nbytes() == piece.numel() * piece.element_size()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["const", "zeros", "mins"])
@pytest.mark.parametrize("group_size", [32, 128, 512])
def test_linears_of_the_cpu_run_padded_parts(kind: str, group_size: int, dtype: torch.dtype) -> None:
    """In bfloat16 on torch's int4 kernel, in float32 expanded: both order and pad their inputs themselves."""
    record = random_record(512, 32, group_size, kind=kind, act_order=True, bias=True)
    x = torch.randn(5, 512, generator=torch.Generator().manual_seed(1)).to(dtype)
    total = torch.zeros(5, 32, dtype=torch.float64)
    for inputs, part in zip(cuts(512, [200]), parts_by_inputs(record, cuts(512, [200])), strict=True):
        prepared = prepare(part, Target(CPU, dtype))
        planned = plan(part, Target(CPU, dtype))
        assert prepared.kernel == ("dense" if dtype == torch.float32 else "cpu_int4")
        assert (planned.kernel, planned.bytes_per_pass) == (prepared.kernel, prepared.bytes_per_pass)
        assert prepared.in_features == len(inputs)
        assert prepared.places is None
        total += prepared(x[:, inputs.start : inputs.stop].contiguous()).double()
    expected = linear(x.float(), record)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert (total - expected).abs().max() < tolerance * expected.abs().max()


def test_padding_is_fed_zeros() -> None:
    """Whatever the code of a row of padding stands for, even where no code is zero, it must add nothing."""
    perm = torch.tensor([2, PADDING, 0, 1, PADDING, PADDING], dtype=torch.int32)
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert InputOrder.of(perm)(x).tolist() == [[3, 0, 1, 2, 0, 0], [6, 0, 4, 5, 0, 0]]
    assert InputOrder.of(perm).is_padded
    natural = InputOrder.of(torch.tensor([2, 0, 1], dtype=torch.int32))
    assert natural(x).tolist() == [[3, 1, 2], [6, 4, 5]]
    assert not natural.is_padded
