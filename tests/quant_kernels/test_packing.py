"""Packing is lossless, its bit order is the documented one, and fusing equals concatenating."""

from __future__ import annotations

import pytest
import torch

from quant_kernels.packed_weight import DenseWeight, PackedWeight
from quant_kernels.packing import (
    can_concat,
    concat_outputs,
    fold_input_order,
    gather_rows,
    pack_codes,
    select_outputs,
    unpack_codes,
)
from quant_kernels.reference import dequantize, linear
from tests.quant_kernels.records import KINDS, random_record


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_round_trip(bits: int) -> None:
    values = torch.randint(0, 2**bits, (64, 24), generator=torch.Generator().manual_seed(1))
    words = pack_codes(values, bits)
    assert words.shape == (64 * bits // 32, 24)
    assert torch.equal(unpack_codes(words, bits).long(), values)


@pytest.mark.parametrize("bits", [4, 8])
def test_gathering_rows_is_unpack_index_pack(bits: int) -> None:
    rng = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 2**bits, (48, 5), generator=rng)
    for order in (torch.randperm(48, generator=rng), torch.randint(0, 48, (64,), generator=rng)):
        assert torch.equal(gather_rows(pack_codes(codes, bits), bits, order), pack_codes(codes[order], bits))


def test_bit_order_is_lsb_first_along_k() -> None:
    # Codes 1, 4, 7, 10, 13, 0, 3, 6 down one column: the published GPTQ word 0x630DA741.
    column = torch.tensor([[1], [4], [7], [10], [13], [0], [3], [6]])
    assert int(pack_codes(column, 4)[0, 0]) == 0x630DA741
    assert int(pack_codes(torch.tensor([[1], [2], [3], [200]]), 8)[0, 0]) == 0xC8030201 - 2**32


@pytest.mark.parametrize("kind", [*KINDS, "codebook"])
@pytest.mark.parametrize("act_order", [False, True])
def test_reference_equals_the_definition(kind: str, act_order: bool) -> None:
    record = random_record(64, 16, 32, kind=kind, act_order=act_order, scale_dtype=torch.float32)
    codes = unpack_codes(record.codes, 4)
    dense = dequantize(record)
    for row, column in [(0, 0), (5, 3), (31, 15), (32, 0), (63, 7)]:
        group = row // 32
        q, s = int(codes[row, column]), float(record.scales[group, column])
        if kind == "const":
            expected = (q - 8) * s
        elif kind == "zeros":
            assert record.zeros is not None
            expected = (q - int(record.zeros[group, column])) * s
        elif kind == "mins":
            assert record.mins is not None
            expected = q * s + float(record.mins[group, column])
        else:
            assert record.codebook is not None
            expected = float(record.codebook[q]) * s
        natural = row if record.perm is None else int(record.perm[row])
        assert float(dense[natural, column]) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_short_last_group_uses_the_last_scale() -> None:
    record = random_record(40, 8, 32)
    assert record.num_groups == 2
    codes = unpack_codes(record.codes, 4)
    assert record.zeros is not None
    expected = (int(codes[39, 2]) - int(record.zeros[1, 2])) * float(record.scales[1, 2])
    assert float(dequantize(record)[39, 2]) == pytest.approx(expected)


@pytest.mark.parametrize("kinds", [("const", "const"), ("const", "zeros"), ("zeros", "zeros"), ("mins", "mins")])
def test_fusing_equals_concatenating(kinds: tuple[str, str]) -> None:
    parts = [random_record(64, 16 * (i + 1), 32, kind=k, bias=i == 1, seed=i) for i, k in enumerate(kinds)]
    fused = concat_outputs(parts)
    assert torch.equal(dequantize(fused), torch.cat([dequantize(p) for p in parts], dim=1))
    assert fused.bias is not None
    assert torch.equal(fused.bias[:16], torch.zeros(16))


def test_records_that_differ_are_not_fused() -> None:
    base = random_record(64, 16, 32)
    others = [
        random_record(64, 16, 64),
        random_record(64, 16, 32, act_order=True),
        random_record(64, 16, 32, kind="mins"),
        random_record(64, 16, 32, bits=8),
        random_record(64, 16, 32, scale_dtype=torch.bfloat16),
    ]
    for other in others:
        fusable, reason = can_concat([base, other])
        assert not fusable
        assert reason
        with pytest.raises(ValueError, match="cannot fuse"):
            concat_outputs([base, other])


def test_same_activation_order_fuses_and_another_does_not() -> None:
    first = random_record(64, 16, 32, act_order=True, seed=3)
    same = random_record(64, 16, 32, act_order=True, seed=3)
    assert torch.equal(concat_outputs([first, same]).perm, first.perm)  # type: ignore[arg-type]
    assert not can_concat([first, random_record(64, 16, 32, act_order=True, seed=4)])[0]


def test_a_contradicting_record_is_refused() -> None:
    record = random_record(64, 16, 32)
    with pytest.raises(ValueError, match="exactly one"):
        PackedWeight(4, record.codes, record.scales, 32, 64, 16)
    with pytest.raises(ValueError, match="scales has shape"):
        PackedWeight(4, record.codes, record.scales[:1], 32, 64, 16, zero_const=8)
    with pytest.raises(ValueError, match="codes has dtype"):
        PackedWeight(4, record.codes.long(), record.scales, 32, 64, 16, zero_const=8)
    with pytest.raises(ValueError, match="4 or 8 bits"):
        PackedWeight(3, record.codes, record.scales, 32, 64, 16, zero_const=8)


@pytest.mark.parametrize("kind", [*KINDS, "codebook"])
def test_outputs_in_another_order(kind: str) -> None:
    record = random_record(64, 24, 32, kind=kind, bias=True)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(linear(x, select_outputs(record, order)), linear(x, record)[:, order])
    dense = DenseWeight(torch.randn(24, 64), torch.randn(24))
    assert torch.allclose(linear(x, select_outputs(dense, order)), linear(x, dense)[:, order])


def test_folding_an_order_changes_nothing() -> None:
    down = random_record(96, 16, 32, act_order=True, bias=True)
    gate, up = random_record(64, 96, 32, seed=1, bias=True), DenseWeight(torch.randn(96, 64))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    expected = linear(linear(x, gate) * linear(x, up), down)
    folded, (new_gate, new_up) = fold_input_order(down, [gate, up])
    assert isinstance(folded, PackedWeight)
    assert folded.perm is None
    got = linear(linear(x, new_gate) * linear(x, new_up), folded)
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_nothing_is_folded_without_an_order() -> None:
    down, gate = random_record(96, 16, 32), random_record(64, 96, 32)
    folded, producers = fold_input_order(down, [gate])
    assert folded is down
    assert producers == [gate]
