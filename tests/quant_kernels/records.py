"""Random PackedWeights of every kind, for tests."""

from __future__ import annotations

import torch

from quant_kernels.attention.kv_format import KVFormat, LayerCache, cache_shapes
from quant_kernels.native.binding import Library
from quant_kernels.packed_weight import PackedWeight
from quant_kernels.packing import pack_codes

KINDS = ("const", "zeros", "mins")


def random_record(
    in_features: int,
    out_features: int,
    group_size: int,
    *,
    kind: str = "zeros",
    bits: int = 4,
    act_order: bool = False,
    bias: bool = False,
    seed: int = 0,
    scale_dtype: torch.dtype = torch.float16,
) -> PackedWeight:
    """A record with codes over the whole range and scales of about 1 / sqrt(K)."""
    rng = torch.Generator().manual_seed(seed)
    groups = -(-in_features // group_size)
    codes = torch.randint(0, 2**bits, (in_features, out_features), generator=rng)
    spread = in_features**-0.5 / 2 ** (bits - 1)
    scales = ((torch.rand(groups, out_features, generator=rng) + 0.5) * spread).to(scale_dtype)
    zeros = torch.randint(1, 2**bits, (groups, out_features), generator=rng).to(torch.uint8)
    mins = (-8 * scales.float() + torch.randn(groups, out_features, generator=rng) * spread).to(scale_dtype)
    codebook = torch.randn(2**bits, generator=rng)
    return PackedWeight(
        bits=bits,
        codes=pack_codes(codes, bits),
        scales=scales,
        group_size=group_size,
        in_features=in_features,
        out_features=out_features,
        zero_const=2 ** (bits - 1) if kind == "const" else None,
        zeros=zeros if kind == "zeros" else None,
        mins=mins if kind == "mins" else None,
        codebook=codebook if kind == "codebook" else None,
        perm=torch.randperm(in_features, generator=rng).int() if act_order else None,
        bias=torch.randn(out_features, generator=rng) if bias else None,
    )


def make_cache(
    kv_format: KVFormat, num_blocks: int, block_size: int, kv_heads: int, head_dim: int, device: torch.device
) -> LayerCache:
    """An empty cache."""
    shapes = cache_shapes(kv_format, num_blocks, block_size, kv_heads, head_dim)
    return LayerCache(kv_format, *(torch.zeros(s, dtype=d, device=device) for s, d in shapes))


def in_order(fine: torch.Tensor) -> torch.Tensor:
    """Fine rows of the CPU kernels, int16 [K], as int32 in the inputs' order."""
    return fine.view(-1, 4)[:, [0, 2, 1, 3]].flatten().int()


def rounded_row(row: torch.Tensor, library: Library, *, is_fine: bool = False) -> torch.Tensor:
    """float64 [K]: a row as the integers stand for it by which the CPU kernels multiply."""
    q, tables = library.quantize(row.float().contiguous(), is_fine=is_fine)
    q = in_order(q) if is_fine else q
    return (q.view(-1, 32).double() * tables[:, :1].double()).flatten()
