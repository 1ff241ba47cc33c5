"""The CPU's int4 layout, written from words, against torch's own converter."""

from __future__ import annotations

import pytest
import torch

from quant_kernels.linear import cpu_int4, int4_layout
from quant_kernels.linear.cpu_int4 import CpuInt4Linear
from quant_kernels.packing import pack_codes
from tests.quant_kernels.records import random_record


def by_torch(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [N, P * K / 2] from codes [K, N], with nothing of ours but the order of the planes."""
    planes = codes if bits == 4 else torch.cat([codes >> 4, codes & 15])
    packed: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(planes.t().int().contiguous(), 1)
    return packed


def random_codes(rows: int, columns: int, bits: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [32, 96, 1056])
@pytest.mark.parametrize("num_blocks", [1, 3, 9])
def test_the_layout_is_torchs(bits: int, rows: int, num_blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    block = int4_layout.block_columns()
    if block is None:
        pytest.skip("this processor's layout is packed by torch alone")
    monkeypatch.setattr(int4_layout, "_WORDS_AT_ONCE", 10_000)  # Several slices, the last one short.
    codes = random_codes(rows, num_blocks * block, bits)
    packed = torch.empty(codes.shape[1], rows * bits // 8, dtype=torch.uint8)
    int4_layout.write(pack_codes(codes, bits), bits, block, packed)
    assert torch.equal(packed.flatten(), by_torch(codes, bits).flatten())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [16, 64, 80, 176, 200])
def test_linears_are_the_same_whoever_packs_them(bits: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    record = random_record(128, columns, 32, bits=bits)
    ours = CpuInt4Linear(record)
    monkeypatch.setattr(int4_layout, "block_columns", lambda: None)
    torchs = CpuInt4Linear(record)
    assert torch.equal(ours.codes, torchs.codes)


def test_a_layout_that_is_not_known_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int4_layout, "_BLOCKS", (16,))
    assert int4_layout.block_columns() is None
    assert cpu_int4.CpuInt4Linear(random_record(64, 64, 32)).codes.shape == (64, 32)
