"""The attention kernel against its specification: formats, head sizes, groups, shares, windows, caps, sinks, orders.

Tolerance: with keys and values as stored, the kernel rounds the weights of the softmax once (unit roundoff u of what it
computes in), and its result once. Weights of one sign sum to at most their own total, so the first is at most u of the
largest value, the second u of the result.
"""

from __future__ import annotations

import math

import pytest
import torch

from quant_kernels.attention import reference
from quant_kernels.attention.kv_format import FP8_E4M3, FP8_E5M2, INT8, KVFormat, plain, read, write
from quant_kernels.attention.paged import Rule, Scratch, attention_constants, paged_attention
from quant_kernels.attention.work import Sharing
from quant_kernels.tolerance import UNIT_ROUNDOFF
from quant_kernels.tuning.attention import AttentionTile
from tests.quant_kernels.caches import Case, make_case
from tests.quant_kernels.records import make_cache

BYTES = (INT8, FP8_E4M3, FP8_E5M2)
FORMATS = (plain(torch.float16), plain(torch.bfloat16), *BYTES)
MIXED = ((0, 1), (70, 1), (33, 9), (0, 20), (150, 2))
TILE = AttentionTile(16, 32, 4, 2)
NUM_SLOTS = 64
SUMS = 3e-5
RNG = torch.Generator().manual_seed(11)


def run(
    case: Case,
    rule: Rule,
    *,
    tile: AttentionTile = TILE,
    shares: int = 4,
    programs: int = 3,
    places: torch.Tensor | None = None,
) -> torch.Tensor:
    """The kernel's result; partial results start as NaN, and counters must end as zeros."""
    _, heads, head_dim = case.query.shape
    scratch = Scratch.make(NUM_SLOTS, heads, case.cache.num_kv_heads, head_dim, case.query.device)
    scratch.sums.fill_(torch.nan)
    scratch.stats.fill_(torch.nan)
    work = case.work(tile, rule.window, Sharing(shares, NUM_SLOTS), programs)
    out = paged_attention(case.query, case.cache, case.blocks, work, scratch, rule, tile, places)
    assert not scratch.counters.any()
    return out


def expected(case: Case, rule: Rule) -> tuple[torch.Tensor, float]:
    """The specification on the cache as it is stored, and the largest value."""
    keys, values = (t.cpu() for t in read(case.cache, slice(None), torch.float32))
    parts = []
    for (start, count), table, row in zip(case.entries, case.tables, case.rows, strict=True):
        sinks = None if rule.sinks is None else rule.sinks.cpu()
        part = case.query[row : row + count].cpu()
        parts.append(
            reference.paged_attention(
                part, keys, values, table, start, rule.scale, rule.window, rule.softcap, sinks
            ).flatten(1)
        )
    largest = max(float(values[table].nan_to_num().abs().max()) for table in case.tables)
    return torch.cat(parts), largest


def check(case: Case, rule: Rule, got: torch.Tensor) -> None:
    wanted, largest = expected(case, rule)
    computed = torch.float16 if case.cache.format.dtype is None else case.cache.format.dtype
    bound = (UNIT_ROUNDOFF[computed] + SUMS) * largest + UNIT_ROUNDOFF[case.query.dtype] * wanted.abs()
    assert got.dtype == case.query.dtype
    assert bool(((got.cpu().float() - wanted).abs() <= bound).all())


def case(
    kv_format: KVFormat,
    device: torch.device,
    *,
    entries: tuple[tuple[int, int], ...] = MIXED,
    heads: int = 6,
    kv_heads: int = 2,
    head_dim: int = 16,
    block_size: int = 16,
    spread: float = 1.0,
) -> Case:
    dtype = kv_format.dtype or torch.float16
    return make_case(
        kv_format,
        entries,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        device=device,
        spread=spread,
    )


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy on rows of a tile that no token has.
@pytest.mark.parametrize("kv_format", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("window", [None, 7, 40])
@pytest.mark.parametrize("shares", [1, 4])
def test_matches_the_specification(kv_format: KVFormat, window: int | None, shares: int, device: torch.device) -> None:
    made = case(kv_format, device)
    rule = Rule(0.25, window)
    check(made, rule, run(made, rule, shares=shares))


@pytest.mark.parametrize("kv_format", [plain(torch.float16), INT8], ids=lambda f: f.name)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("block_size", [16, 32])
def test_head_and_block_sizes(kv_format: KVFormat, head_dim: int, block_size: int, device: torch.device) -> None:
    made = case(kv_format, device, head_dim=head_dim, block_size=block_size, entries=((40, 1), (3, 5)), heads=2)
    rule = Rule(head_dim**-0.5)
    check(made, rule, run(made, rule))


@pytest.mark.parametrize("head_dim", [8, 16, 24, 64, 80])
def test_products_are_long_enough_for_tensor_cores(head_dim: int) -> None:
    """The interpreter multiplies matrices of any size; the compiler refuses sums of fewer than 16 products."""
    block = attention_constants(INT8, TILE, head_dim, 16, torch.float16)["BLOCK_D"]
    assert block >= head_dim
    assert block // 2 >= 16


@pytest.mark.parametrize("kv_format", [plain(torch.float16), FP8_E4M3], ids=lambda f: f.name)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (7, 1), (16, 1), (4, 4)])
def test_groups(kv_format: KVFormat, heads: int, kv_heads: int, device: torch.device) -> None:
    made = case(kv_format, device, heads=heads, kv_heads=kv_heads)
    check(made, Rule(0.25), run(made, Rule(0.25)))


@pytest.mark.parametrize("kv_format", [plain(torch.float16), INT8], ids=lambda f: f.name)
@pytest.mark.parametrize("shares", [1, 4])
def test_caps_and_sinks(kv_format: KVFormat, shares: int, device: torch.device) -> None:
    made = case(kv_format, device)
    sinks = torch.tensor([-3.0, 0.0, 2.0, 9.0, 40.0, -60.0], device=device)
    for rule in (Rule(1.0, softcap=2.0), Rule(1.0, sinks=sinks), Rule(1.0, window=9, softcap=5.0, sinks=sinks)):
        check(made, rule, run(made, rule, shares=shares))


def test_tall_tiles(device: torch.device) -> None:
    made = case(plain(torch.float16), device, entries=((0, 40), (130, 33), (20, 1)))
    rule = Rule(0.25)
    check(made, rule, run(made, rule, tile=AttentionTile(64, 32, 4, 2)))


def test_columns_go_to_their_places(device: torch.device) -> None:
    made = case(plain(torch.float16), device)
    perm = torch.randperm(6 * 16, generator=torch.Generator().manual_seed(3)).to(device)
    for tile in (TILE, AttentionTile(64, 32, 4, 2)):
        plainly = run(made, Rule(0.25), tile=tile)
        assert torch.equal(run(made, Rule(0.25), tile=tile, places=torch.argsort(perm).int()), plainly[:, perm])


# e5m2 has no scale, and values of 1e-6 are below its smallest.
@pytest.mark.parametrize(("kv_format", "spread"), [*((f, 1e4) for f in BYTES), (INT8, 1e-6), (FP8_E4M3, 1e-6)])
def test_values_of_any_size(kv_format: KVFormat, spread: float, device: torch.device) -> None:
    """Weights that carry their value's scale stay within float16, however small or large values are."""
    made = case(kv_format, device, spread=spread)
    made = Case(made.entries, made.tables, made.cache, made.query.float())
    check(made, Rule(0.25), run(made, Rule(0.25)))


def test_one_tiny_value_does_not_hide_the_others(device: torch.device) -> None:
    """A token that gets nearly all attention and whose value is zero, as the first ones often are."""
    made = case(INT8, device, entries=((60, 1),))
    assert made.cache.scales is not None
    first = made.tables[0][0]
    made.cache.values.view(made.cache.values.shape)[first, 0] = (made.cache.values[first, 0] & -256) | 128
    made.cache.scales[first, :, 0, 1] = 2.0**-100
    check(made, Rule(3.0), run(made, Rule(3.0)))


@pytest.mark.parametrize("kv_format", BYTES, ids=lambda f: f.name)
def test_what_quantizing_costs_is_bounded(kv_format: KVFormat, device: torch.device) -> None:
    """If no score moves by more than e, no weight of the softmax moves by more than a factor exp(2 e).

    So a result moves by at most (exp(2 e) - 1) times the largest value, and by the values' own error.
    """
    made = case(kv_format, device, entries=((60, 1), (20, 5)), spread=0.5)
    keys, values = (torch.randn(made.cache.keys.shape[0] * 16, 2, 16, generator=RNG) for _ in range(2))
    slots = torch.tensor([b * 16 + t for table in made.tables for b in table for t in range(16)])
    for cache in (made.cache, exact := make_cache(plain(torch.float32), len(keys) // 16, 16, 2, 16, device)):
        write(cache, slots.to(device), keys[slots].to(device), values[slots].to(device))
    rule = Rule(0.25)
    got = run(made, rule).cpu().float()
    wanted, largest = expected(Case(made.entries, made.tables, exact, made.query), rule)
    key_error, value_error = (
        float((a.cpu() - b.cpu()).abs()[made.blocks.tolist()].max())
        for a, b in zip(read(made.cache, slice(None), torch.float32), (exact.keys, exact.values), strict=True)
    )
    assert key_error > 0
    moved = rule.scale * float(made.query.abs().sum(dim=-1).max()) * key_error
    bound = math.expm1(2 * moved) * largest + value_error + UNIT_ROUNDOFF[torch.float16] * (largest + 1)
    assert float((got - wanted).abs().max()) <= bound
    assert not torch.allclose(got, wanted, atol=1e-5), "the cache is not quantized at all"


@pytest.mark.parametrize("kv_format", [plain(torch.float16), INT8], ids=lambda f: f.name)
def test_a_row_has_the_same_bits_in_any_company(kv_format: KVFormat, device: torch.device) -> None:
    together = case(kv_format, device, entries=((300, 1), (20, 1), (90, 1)))
    rule = Rule(0.25)
    whole = run(together, rule, programs=2)
    for i in range(3):
        alone = Case(together.entries[i : i + 1], together.tables[i : i + 1], together.cache, together.query[i : i + 1])
        for programs in (1, 5):
            assert torch.equal(run(alone, rule, programs=programs), whole[i : i + 1])
