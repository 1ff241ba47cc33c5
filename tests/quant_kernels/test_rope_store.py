"""The store kernel against torch's operations: queries, and the cache bit for bit where rounding leaves no choice.

Codes may differ by one where the two compute a quotient or an angle a little differently; numbers by a rounding.
"""

from __future__ import annotations

import pytest
import torch

from quant_kernels.attention.kv_format import FP8_E4M3, FP8_E5M2, INT8, KVFormat, LayerCache, plain, read
from quant_kernels.attention.store import HeadNorms, Placement, rope_store
from quant_kernels.ops.base import Heads
from quant_kernels.ops.torch_ops import TorchInputs, TorchOps
from tests.quant_kernels.records import make_cache

BYTES = (INT8, FP8_E4M3, FP8_E5M2)
#: The distance of neighbouring numbers, relative to the larger one or to the scale.
STEPS = {"int8": 1 / 127, "fp8_e4m3": 2**-3, "fp8_e5m2": 2**-2}
ROWS = 5


def tables(head_dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.outer(torch.arange(64.0), 100.0 ** -torch.linspace(0, 1, head_dim // 2))
    return angles.cos().to(device), angles.sin().to(device)


def both(
    kv_format: KVFormat,
    device: torch.device,
    *,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    splits: int = 1,
    normed: bool = False,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
) -> tuple[tuple[torch.Tensor, LayerCache], tuple[torch.Tensor, LayerCache]]:
    """(queries, cache) of the kernel and of torch, for rows of which the last stores nothing."""
    rng = torch.Generator().manual_seed(2)
    num_heads, kv_heads = heads
    x = (torch.randn(splits, ROWS, (num_heads + 2 * kv_heads) * head_dim, generator=rng) * scale).to(device)
    x = x.to(dtype) if splits == 1 else x
    weights = (torch.rand(2, head_dim, generator=rng) + 0.5).to(device, dtype) if normed else None
    positions = torch.tensor([0, 9, 33, 63, 5], dtype=torch.int32, device=device)
    slots = torch.tensor([17, 3, 40, 31, -1], dtype=torch.int32, device=device)
    cos, sin = tables(head_dim, device)
    caches = [make_cache(kv_format, 4, 16, kv_heads, head_dim, device) for _ in range(2)]
    norms = None if weights is None else HeadNorms(weights, 1e-5)
    query = rope_store(x, num_heads, caches[0], Placement(positions, slots, cos, sin), dtype, norms)

    shape = Heads(num_heads, kv_heads, head_dim, norms=None if weights is None else weights.float(), norm_eps=1e-5)
    angles = (t[positions.long()].unsqueeze(1) for t in (cos, sin))
    kept = x.float()[:, :-1]
    inputs = TorchInputs(slots[:-1].long(), *(angle[:-1] for angle in angles), segments=())
    expected = TorchOps().store(kept, torch.float32, shape, caches[1], inputs)
    return (query, caches[0]), (expected, caches[1])


def check_cache(got: LayerCache, expected: LayerCache) -> None:
    for mine, theirs in zip(
        read(got, slice(None), torch.float32), read(expected, slice(None), torch.float32), strict=True
    ):
        if got.format.dtype is not None:
            # A GPU contracts products and sums, and its square roots are approximate: float32 differs in its last bits.
            step = max(torch.finfo(got.format.dtype).eps, 4e-6)
            assert torch.allclose(mine, theirs, rtol=step, atol=4e-6)
            continue
        largest = theirs.abs().amax(dim=-1, keepdim=True)
        base = largest if got.format is INT8 else theirs.abs()
        # Nearly all codes are the same; where they are not, they are neighbours.
        assert bool(((mine - theirs).abs() <= base * STEPS[got.format.name] * 1.01 + 1e-5).all())
        assert float((mine == theirs).float().mean()) > 0.99
    if got.scales is not None and expected.scales is not None:
        assert torch.allclose(got.scales.float(), expected.scales.float(), rtol=2**-7, atol=0)


@pytest.mark.parametrize(
    "kv_format", [*map(plain, (torch.float16, torch.bfloat16, torch.float32)), *BYTES], ids=lambda f: f.name
)
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("normed", [False, True])
def test_matches_torch(kv_format: KVFormat, splits: int, normed: bool, device: torch.device) -> None:
    (query, got), (wanted, expected) = both(kv_format, device, splits=splits, normed=normed)
    assert torch.allclose(query[:-1], wanted, rtol=1e-5, atol=1e-5)
    check_cache(got, expected)


@pytest.mark.parametrize("kv_format", [plain(torch.float16), INT8, FP8_E4M3], ids=lambda f: f.name)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads", [(8, 8), (7, 1), (9, 3)])
def test_shapes(kv_format: KVFormat, head_dim: int, heads: tuple[int, int], device: torch.device) -> None:
    (query, got), (wanted, expected) = both(kv_format, device, heads=heads, head_dim=head_dim)
    assert torch.allclose(query[:-1], wanted, rtol=1e-5, atol=1e-5)
    check_cache(got, expected)


@pytest.mark.parametrize("kv_format", BYTES, ids=lambda f: f.name)
@pytest.mark.parametrize("scale", [1e-7, 1e6])
def test_sizes_that_floats_of_eight_bits_do_not_have(kv_format: KVFormat, scale: float, device: torch.device) -> None:
    (_, got), (_, expected) = both(kv_format, device, scale=scale)
    check_cache(got, expected)


def test_rows_that_fill_a_batch_up_store_nothing(device: torch.device) -> None:
    (_, got), _ = both(plain(torch.float32), device)
    written = got.keys.flatten(0, 1).abs().sum(dim=(1, 2)).nonzero().flatten().tolist()
    assert written == [3, 17, 31, 40]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_queries_are_rounded_once(dtype: torch.dtype, device: torch.device) -> None:
    (query, _), (wanted, _) = both(plain(dtype), device, dtype=dtype)
    assert query.dtype == dtype
    assert bool(((query[:-1].float() - wanted).abs() <= wanted.abs() * torch.finfo(dtype).eps / 2 + 1e-6).all())


@pytest.mark.parametrize("kv_format", [INT8, FP8_E4M3], ids=lambda f: f.name)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_by_its_scale(kv_format: KVFormat, bad: float, device: torch.device) -> None:
    """On both paths: a number that is none must not become a wrong one in silence."""
    x = torch.ones(1, 1, (2 + 2 * 2) * 16)
    x[..., 2 * 16 + 3] = bad
    x[..., 4 * 16 + 9] = bad
    cos, sin = tables(16, device)
    place = torch.zeros(1, dtype=torch.int32, device=device)
    mine, theirs = (make_cache(kv_format, 1, 16, 2, 16, device) for _ in range(2))
    rope_store(x.to(device), 2, mine, Placement(place, place, cos, sin), torch.float32)
    inputs = TorchInputs(place.long(), cos[:1].unsqueeze(1), sin[:1].unsqueeze(1), segments=())
    TorchOps().store(x.to(device), torch.float32, Heads(2, 2, 16), theirs, inputs)
    for cache in (mine, theirs):
        assert cache.scales is not None
        assert cache.scales[0, :, 0].isfinite().tolist() == [[False, False], [True, True]]
