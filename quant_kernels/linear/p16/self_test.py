"""One tile, by assembly and by its plain twin: whether this compiler and this device do what the assembly says.

The texts are checked bit by bit elsewhere; this asks what no test without the device can. It takes milliseconds once
both kernels are compiled, and Triton keeps them on disk.
"""

from __future__ import annotations

import torch

from quant_kernels.linear.p16.layout import pack
from quant_kernels.linear.p16.matmul import matmul
from quant_kernels.packed_weight import PackedWeight
from quant_kernels.packing import pack_codes
from quant_kernels.tuning.tile import Tile

_SIZE, _GROUP = 128, 32


def assembly_is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the fast path gives the twin's bits for a tile of every code and several zero points."""
    rng = torch.Generator().manual_seed(0)
    groups = _SIZE // _GROUP
    record = PackedWeight(
        bits=4,
        codes=pack_codes(torch.randint(0, 16, (_SIZE, _SIZE), generator=rng), 4),
        scales=(torch.rand(groups, _SIZE, generator=rng) + 0.5).to(dtype),
        group_size=_GROUP,
        in_features=_SIZE,
        out_features=_SIZE,
        zeros=torch.randint(0, 17, (groups, _SIZE), generator=rng).to(torch.uint8),
    )
    packed = pack(record, dtype, device)
    x = torch.randn(16, _SIZE, generator=rng).to(device, dtype)
    tile = Tile(16, 128)
    return torch.equal(matmul(x, packed, tile), matmul(x, packed, tile, twin=True))
