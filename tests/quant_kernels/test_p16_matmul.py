"""The matmul kernels against the reference, over odd shapes, every kind of weight and every tile.

On a machine without a GPU Triton's interpreter runs the plain twin; where there is one, the assembly runs.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from quant_kernels.linear.p16.expand import expand, expanded_matmul, slice_columns
from quant_kernels.linear.p16.gate_up import gate_up
from quant_kernels.linear.p16.layout import P16Weight, can_pack, pack
from quant_kernels.linear.p16.matmul import matmul
from quant_kernels.packed_weight import PackedWeight
from quant_kernels.reference import dequantize, linear
from quant_kernels.tolerance import Error, bound, error
from quant_kernels.tuning.tile import Tile
from tests.quant_kernels.records import KINDS, random_record

DTYPES = (torch.float16, torch.bfloat16)
BASE = Tile(16, 128)
TILES = (
    *(Tile(16, 64, num_warps=2), BASE, Tile(16, 256, num_warps=8)),
    *(Tile(32, 128, num_stages=3), Tile(64, 128, 16, scale_weight=True), Tile(64, 128, num_stages=3)),
)
#: M, K, N, group: single rows, odd sizes, one group, a short last block, a partial last tile, a short last group.
SHAPES = [(1, 256, 96, 128), (3, 160, 130, 32), (17, 384, 128, 64), (5, 256, 40, 256), (2, 192, 72, 128)]


def inputs(rows: int, weight: PackedWeight, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    x = torch.randn(rows, weight.in_features, generator=torch.Generator().manual_seed(rows))
    return x.to(device, dtype)


def stored_order(x: torch.Tensor, weight: P16Weight) -> torch.Tensor:
    return x if weight.perm is None else x[:, weight.perm.long()].contiguous()


def check(got: torch.Tensor, expected: torch.Tensor, allowed: Error) -> None:
    found = error(got.cpu(), expected)
    assert found.within(allowed), f"{found} exceeds {allowed}"


@pytest.mark.parametrize("kind", [*KINDS, "codebook"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind_of_weight(
    kind: str, shape: tuple[int, int, int, int], bits: int, dtype: torch.dtype, device: torch.device
) -> None:
    rows, in_features, out_features, group = shape
    record = random_record(in_features, out_features, group, kind=kind, bits=bits, bias=True, act_order=True)
    if not can_pack(record, dtype)[0]:
        assert bits == 8
        return
    packed = pack(record, dtype, device)
    x = inputs(rows, record, dtype, device)
    expected = linear(x.cpu(), record)
    whole = matmul(stored_order(x, packed), packed, BASE)
    assert whole.shape == (1, rows, out_features)
    assert whole.dtype == dtype
    check(whole[0], expected, bound(packed.scheme, dtype, scale_weight=False))
    split = matmul(stored_order(x, packed), packed, BASE, 3)
    assert split.shape == (3, rows, out_features)
    assert split.dtype == torch.float32
    check(split.sum(0), expected, bound(packed.scheme, torch.float32, scale_weight=False))


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.name)
@pytest.mark.parametrize("rows", [1, 17, 70])
@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_every_tile(tile: Tile, rows: int, group: int, device: torch.device) -> None:
    record = random_record(256, 200, group)
    packed = pack(record, torch.float16, device)
    x = inputs(rows, record, torch.float16, device)
    allowed = bound(packed.scheme, torch.float16, scale_weight=tile.scale_weight)
    check(matmul(x, packed, tile)[0], linear(x.cpu(), record), allowed)


@pytest.mark.parametrize("word_rows", [16, 32])
def test_float16_sums(word_rows: int, device: torch.device) -> None:
    record = random_record(512, 128, 128)
    packed = pack(record, torch.float16, device)
    x = inputs(64, record, torch.float16, device)
    tile = Tile(64, 128, word_rows, scale_weight=True, half_sums=True)
    got = matmul(x, packed, tile)[0]
    check(got, linear(x.cpu(), record), bound(packed.scheme, torch.float16, scale_weight=True, half_sums=True))
    whole = matmul(x, packed, replace(tile, half_sums=False))[0]
    assert not torch.equal(got, whole), "float16 sums round differently, so they did not run"


def test_float16_sums_are_for_float16_alone(device: torch.device) -> None:
    record = random_record(128, 128, 128)
    packed = pack(record, torch.bfloat16, device)
    x = inputs(2, record, torch.bfloat16, device)
    tile = Tile(64, 128, scale_weight=True, half_sums=True)
    assert torch.equal(matmul(x, packed, tile), matmul(x, packed, replace(tile, half_sums=False)))


def test_scales_of_another_type_than_the_activations(device: torch.device) -> None:
    for scale_dtype, dtype in ((torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)):
        for group in (32, 128):
            record = random_record(256, 64, group, scale_dtype=scale_dtype)
            packed = pack(record, dtype, device)
            x = inputs(4, record, dtype, device)
            for tile in (BASE, Tile(64, 128, 16, scale_weight=True)):
                allowed = bound(packed.scheme, dtype, scale_weight=tile.scale_weight)
                check(matmul(x, packed, tile)[0], linear(x.cpu(), record), allowed)


def test_a_row_does_not_depend_on_its_neighbours(device: torch.device) -> None:
    record = random_record(256, 96, 64)
    packed = pack(record, torch.float16, device)
    x = inputs(16, record, torch.float16, device)
    together = matmul(x, packed, BASE, 2)
    for row in (0, 7, 15):
        alone = torch.zeros_like(x)
        alone[row] = x[row]
        assert torch.equal(matmul(alone, packed, BASE, 2)[:, row], together[:, row])
        first = matmul(x[row : row + 1], packed, BASE, 2)[:, 0]
        # The interpreter's dot is numpy's, which on some processors rounds by a row's place in the tile.
        assert torch.equal(first, together[:, row]) or (
            device.type == "cpu" and torch.allclose(first, together[:, row], rtol=1e-6, atol=1e-6)
        )
    poisoned = x.clone()
    poisoned[3] = float("nan")
    others = [row for row in range(16) if row != 3]
    assert torch.equal(matmul(poisoned, packed, BASE, 2)[:, others], together[:, others])


def test_splits_repeat_bit_for_bit(device: torch.device) -> None:
    record = random_record(512, 128, 128)
    packed = pack(record, torch.float16, device)
    x = inputs(4, record, torch.float16, device)
    first = matmul(x, packed, BASE, 4)
    assert all(torch.equal(matmul(x, packed, BASE, 4), first) for _ in range(3))


@pytest.mark.parametrize("group", [32, 128, 1152])
def test_a_split_without_work_adds_nothing(group: int, device: torch.device) -> None:
    """Nine blocks in eight shares of two: the last three shares are empty."""
    record = random_record(1152, 64, group, bias=True)
    packed = pack(record, torch.float16, device)
    x = inputs(3, record, torch.float16, device)
    sums = matmul(x, packed, BASE, 8)
    assert not sums[5:].any()
    check(sums.sum(0), linear(x.cpu(), record), bound(packed.scheme, torch.float32, scale_weight=False))


def test_inputs_beyond_the_last_block_are_not_read(device: torch.device) -> None:
    record = random_record(160, 64, 32)
    packed = pack(record, torch.float16, device)
    padded = torch.full((2, 512), float("nan"), dtype=torch.float16, device=device)
    padded[:, :160] = inputs(2, record, torch.float16, device)
    x = padded[:, :160]
    check(matmul(x, packed, BASE)[0], linear(x.cpu(), record), bound(packed.scheme, x.dtype, scale_weight=False))


def test_wrong_calls_are_our_bugs(device: torch.device) -> None:
    packed = pack(random_record(128, 64, 32), torch.float16, device)
    with pytest.raises(AssertionError, match="columns"):
        matmul(torch.zeros(1, 64, dtype=torch.float16, device=device), packed, BASE)
    with pytest.raises(AssertionError, match="do not fill"):
        matmul(torch.zeros(1, 128, dtype=torch.float16, device=device), packed, Tile(16, 256))


@pytest.mark.parametrize("kind", [*KINDS, "codebook"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "in_features", "group"), [(1, 256, 128), (17, 160, 32), (3, 256, 256)])
def test_gate_up(kind: str, dtype: torch.dtype, rows: int, in_features: int, group: int, device: torch.device) -> None:
    record = random_record(in_features, 128, group, kind=kind, bias=True)
    packed = pack(record, dtype, device)
    x = inputs(rows, record, dtype, device)
    gate, up = linear(x.cpu(), record).chunk(2, dim=-1)
    tile = Tile(32 if rows > 16 else 16, 64, num_stages=3)
    got = gate_up(x, packed, tile)
    assert got.dtype == dtype
    allowed = bound(packed.scheme, dtype, scale_weight=False)
    # Both factors carry the sums' error; silu passes at most 1.1 of its own on.
    check(got, F.silu(gate) * up, Error(3 * allowed.worst, 3 * allowed.mean))


@pytest.mark.parametrize("kind", [*KINDS, "codebook"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("in_features", "out_features", "group"), [(256, 200, 64), (160, 40, 32), (256, 136, 256)])
def test_expand(
    kind: str, bits: int, dtype: torch.dtype, in_features: int, out_features: int, group: int, device: torch.device
) -> None:
    record = random_record(in_features, out_features, group, kind=kind, bits=bits, bias=True)
    if not can_pack(record, dtype)[0]:
        assert bits == 8
        return
    packed = pack(record, dtype, device)
    plain = expand(packed, 0, out_features)
    allowed = bound(packed.scheme, torch.float32, scale_weight=True)
    check(plain, dequantize(record), allowed)
    x = inputs(3, record, dtype, device)
    check(expanded_matmul(x, packed), linear(x.cpu(), record), bound(packed.scheme, dtype, scale_weight=True))


def test_expanding_goes_slice_by_slice(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quant_kernels.linear.p16.expand.SCRATCH_BYTES", 2 * 256 * 128)
    record = random_record(256, 300, 64, bias=True)
    packed = pack(record, torch.float16, device)
    assert slice_columns(256) == 128
    assert torch.equal(expand(packed, 128, 100), expand(packed, 0, 300)[:, 128:228])
    x = inputs(5, record, torch.float16, device)
    check(expanded_matmul(x, packed), linear(x.cpu(), record), bound(packed.scheme, x.dtype, scale_weight=True))


def test_the_bound_would_notice() -> None:
    record = random_record(256, 64, 128)
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    expected = linear(x, record)
    allowed = bound(pack(record, torch.float16, torch.device("cpu")).scheme, torch.float16, scale_weight=False)
    assert error(expected.half(), expected).within(allowed)
    other = replace(record, scales=record.scales * 1.01)
    assert not error(linear(x, other).half(), expected).within(allowed)
    assert not error(torch.full_like(expected, float("nan")), expected).within(allowed)
