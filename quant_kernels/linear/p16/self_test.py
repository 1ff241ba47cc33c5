"""One tile, by assembly and by its plain twin: whether this compiler and this device do what the assembly says.

The texts are checked bit by bit elsewhere; this asks what no test without the device can. It takes milliseconds once
both kernels are compiled, and Triton keeps them on disk.
"""

from __future__ import annotations

import torch

from quant_kernels.linear.p16.layout import P16Weight, pack
from quant_kernels.linear.p16.matmul import matmul
from quant_kernels.packed_weight import PackedWeight
from quant_kernels.packing import pack_codes
from quant_kernels.tuning.tile import Tile

_SIZE, _GROUP = 128, 32


def assembly_is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the fast path gives its twin's bits for a tile of 4-bit weights, with one zero point and with many."""
    rng = torch.Generator().manual_seed(0)
    table = (_SIZE // _GROUP, _SIZE)
    codes = pack_codes(torch.randint(0, 16, (_SIZE, _SIZE), generator=rng), 4)
    scales = (torch.rand(table, generator=rng) + 0.5).to(dtype)
    zeros = torch.randint(0, 17, table, generator=rng).to(torch.uint8)
    x = torch.randn(16, _SIZE, generator=rng).to(device, dtype)
    records = (
        PackedWeight(4, codes, scales, _GROUP, _SIZE, _SIZE, zero_const=8),
        PackedWeight(4, codes, scales, _GROUP, _SIZE, _SIZE, zeros=zeros),
    )
    return all(_equals_twin(x, pack(record, dtype, device)) for record in records)


def _equals_twin(x: torch.Tensor, weight: P16Weight) -> bool:
    tile = Tile(16, 128)
    return torch.equal(matmul(x, weight, tile), matmul(x, weight, tile, twin=True))
