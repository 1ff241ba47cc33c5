"""Quantized caches: every byte's number, what quantizing may cost, layouts, and reading back in any order.

Bounds: int8 has steps of one scale, so a number is off by half of it, and the scale is at most 2^-7 above the largest
number / 127 (bfloat16, rounded up); e4m3 keeps 4 significant bits, so it is off by 2^-4 of the number, or by half of
its smallest step, 2^-9 scales; e5m2 keeps 3, so by 2^-3, or by half of 2^-16.
"""

from __future__ import annotations

import pytest
import torch

from quant_kernels.attention.kv_format import (
    E4M3_MAX,
    E5M2_MAX,
    FP8_E4M3,
    FP8_E5M2,
    INT8,
    INT8_MAX,
    KV_FORMATS,
    KVFormat,
    decode,
    encode,
    plain,
    read,
    turn,
    turned_together,
    turning,
    write,
)
from tests.quant_kernels.records import make_cache

CPU = torch.device("cpu")
BYTES = (INT8, FP8_E4M3, FP8_E5M2)


def numbers(seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** torch.randint(-6, 5, (200, 1), generator=rng)
    return torch.randn(200, 32, generator=rng) * sizes


def read_back(x: torch.Tensor, kv_format: KVFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """x after quantizing, and its scales [..., 1] (ones without)."""
    codes, scales = encode(x, kv_format)
    factor = torch.ones(*x.shape[:-1], 1) if scales is None else scales.float().unsqueeze(-1)
    return decode(codes, kv_format, torch.float32) * factor, factor


def test_int8_is_off_by_half_a_step() -> None:
    x = numbers()
    got, scales = read_back(x, INT8)
    assert bool(((got - x).abs() <= scales * 0.5 * (1 + 1e-5)).all())
    largest = x.abs().amax(dim=-1, keepdim=True)
    assert bool((scales >= largest / INT8_MAX).all())
    assert bool((scales <= largest / INT8_MAX * (1 + 2**-7)).all())


def test_e4m3_keeps_four_bits() -> None:
    x = numbers()
    got, scales = read_back(x, FP8_E4M3)
    assert bool(((got - x).abs() <= torch.maximum(x.abs() * 2**-4, scales * 2**-10) * (1 + 1e-5)).all())
    assert float((x / scales).abs().max()) <= E4M3_MAX


def test_e5m2_keeps_three_bits_and_saturates() -> None:
    x = numbers().clamp(-E5M2_MAX, E5M2_MAX)
    got, _ = read_back(x, FP8_E5M2)
    assert bool(((got - x).abs() <= torch.maximum(x.abs() * 2**-3, torch.tensor(2.0**-17))).all())
    assert read_back(torch.tensor([[1e9, -1e9]]), FP8_E5M2)[0].tolist() == [[E5M2_MAX, -E5M2_MAX]]
    assert bool(read_back(torch.tensor([[torch.nan, torch.inf]]), FP8_E5M2)[0].isfinite().all())


@pytest.mark.parametrize("kv_format", BYTES, ids=lambda f: f.name)
def test_zeros_stay_zeros(kv_format: KVFormat) -> None:
    got, scales = read_back(torch.zeros(3, 8), kv_format)
    assert not got.any()
    assert bool((scales > 0).all())


@pytest.mark.parametrize("kv_format", KV_FORMATS.values(), ids=KV_FORMATS)
@pytest.mark.parametrize("block_size", [2, 16])
def test_what_is_written_is_read(kv_format: KVFormat, block_size: int) -> None:
    cache = make_cache(kv_format, 7, block_size, 3, 6, CPU)
    rng = torch.Generator().manual_seed(1)
    slots = torch.randperm(7 * block_size, generator=rng)[: 4 * block_size]
    keys, values = torch.randn(len(slots), 3, 6, generator=rng), torch.randn(len(slots), 3, 6, generator=rng)
    for part in (slice(0, 5), slice(5, None)):
        write(cache, slots[part], keys[part], values[part])
    got_keys, got_values = (t.flatten(0, 1)[slots] for t in read(cache, slice(None), torch.float32))
    for got, x in ((got_keys, keys), (got_values, values)):
        wanted = x.to(kv_format.dtype).float() if kv_format.dtype is not None else read_back(x, kv_format)[0]
        assert torch.equal(got, wanted)
    some = torch.tensor([5, 0, 5])
    for whole, part in zip(read(cache, slice(None), torch.float32), read(cache, some, torch.float32), strict=True):
        assert torch.equal(whole[some], part)


def test_words_are_laid_out_as_described() -> None:
    cache = make_cache(INT8, 2, 4, 1, 6, CPU)
    keys = torch.arange(6.0).view(1, 1, 6) * 127 / 5
    for token in range(4):
        write(cache, torch.tensor([4 + token]), keys, torch.full((1, 1, 6), token + 1.0))
    low, high = cache.keys[1, 2, 0] & 0xFF, (cache.keys[1, 2, 0] >> 8) & 0xFF
    assert (torch.cat([low, high]) - 128).tolist() == keys.flatten().round().int().tolist()
    assert cache.values.shape == (2, 2, 1, 6)
    codes = cache.values[1, :, 0, 0]
    assert cache.scales is not None
    scales = cache.scales[1, 0, :, 1].float()
    lanes = torch.stack([codes & 0xFF, (codes >> 8) & 0xFF]).flatten() - 128
    assert torch.allclose(lanes * scales, torch.tensor([1.0, 2.0, 3.0, 4.0]), rtol=1e-2)


@pytest.mark.parametrize("head_dim", [6, 64, 80, 96, 128, 256])
def test_turning_keeps_products_and_spreads_outliers(head_dim: int) -> None:
    rng = torch.Generator().manual_seed(4)
    queries, keys = torch.randn(50, head_dim, generator=rng), torch.randn(50, head_dim, generator=rng)
    assert torch.allclose(turn(queries) @ turn(keys).T, queries @ keys.T, rtol=1e-4, atol=1e-4)
    identity = turning(head_dim) @ turning(head_dim).T
    assert torch.allclose(identity, torch.eye(head_dim), atol=1e-6)
    outlier = torch.zeros(1, head_dim)
    outlier[0, 1] = 1.0
    assert float(turn(outlier).abs().max()) == pytest.approx((2 * turned_together(head_dim)) ** -0.5)


def test_turned_keys_lose_less_to_quantizing() -> None:
    """Where one channel is thirty times the others, as in real keys."""
    keys = torch.randn(100, 128, generator=torch.Generator().manual_seed(5))
    keys[:, 17] *= 30

    def lost(x: torch.Tensor) -> float:
        return float((read_back(x, INT8)[0] - x).norm())

    assert lost(turn(keys)) < 0.5 * lost(keys)


def test_bytes_per_token() -> None:
    half = plain(torch.float16).bytes_per_token(8, 128)
    assert half == 2 * 8 * 128 * 2
    assert FP8_E5M2.bytes_per_token(8, 128) * 2 == half
    assert INT8.bytes_per_token(8, 128) == FP8_E4M3.bytes_per_token(8, 128) == half // 2 + 2 * 8 * 2
    for kv_format in KV_FORMATS.values():
        cache = make_cache(kv_format, 3, 4, 2, 16, CPU)
        held = sum(part.numel() * part.element_size() for part in cache.parts())
        assert held == 12 * kv_format.bytes_per_token(2, 16)


def test_an_odd_block_cannot_pair_tokens() -> None:
    with pytest.raises(ValueError, match="block_size is 3; a cache of int8 pairs tokens"):
        make_cache(INT8, 2, 3, 1, 8, CPU)
