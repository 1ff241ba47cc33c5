"""Attention and its store on a GPU at real sizes: long contexts, every format, shares that race, assembly and twin.

Expected results are computed on the device, in float32 without tf32, from the cache as it is stored. The bound is that
of `test_paged`: weights of the softmax are rounded once, and the result once.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import triton
import triton.language as tl

from quant_kernels.attention.kv_format import FP8_E4M3, FP8_E5M2, INT8, KVFormat, LayerCache, plain, read
from quant_kernels.attention.paged import Rule, Scratch, paged_attention
from quant_kernels.attention.store import HeadNorms, Placement, rope_store
from quant_kernels.attention.words import unpack
from quant_kernels.attention.work import Sharing
from quant_kernels.ops.base import Heads
from quant_kernels.ops.torch_ops import TorchInputs, TorchOps
from quant_kernels.tolerance import UNIT_ROUNDOFF
from quant_kernels.tuning.attention import AttentionTile, attention_tiles, most_shares, select_attention
from quant_kernels.tuning.card import card_of
from tests.quant_kernels.caches import Case, make_case
from tests.quant_kernels.records import make_cache
from tests.quant_kernels.test_rope_store import check_cache

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
FP16, BF16 = plain(torch.float16), plain(torch.bfloat16)
BYTES = (INT8, FP8_E4M3, FP8_E5M2)
FORMATS = (FP16, BF16, *BYTES)
HEADS, KV_HEADS = 32, 8
NUM_SLOTS = 1024
SUMS = 3e-5
#: (tokens before, tokens of the step) of each sequence.
STEPS: dict[str, tuple[tuple[int, int], ...]] = {
    "decode 1": ((16383, 1),),
    "decode 8": tuple((start, 1) for start in (0, 15, 16, 511, 1023, 4095, 8191, 16383)),
    "decode 64": tuple((53 * i, 1) for i in range(64)),
    "prompt": ((0, 2048),),
    "chunks": ((0, 300), (1000, 700), (8000, 129), (5, 1), (4000, 1)),
}
RACES = 50


def make(
    kv_format: KVFormat,
    entries: Sequence[tuple[int, int]],
    *,
    head_dim: int = 128,
    block_size: int = 16,
    heads: int = HEADS,
    dtype: torch.dtype | None = None,
) -> Case:
    return make_case(
        kv_format,
        entries,
        heads=heads,
        kv_heads=KV_HEADS,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype or kv_format.dtype or torch.float16,
        device=CUDA,
    )


def tile_of(case: Case) -> AttentionTile:
    """What the engine would run."""
    group = case.query.shape[1] // KV_HEADS
    longest = max(count for _, count in case.entries)
    packed = case.cache.format.dtype is None
    return select_attention(card_of(CUDA), case.cache.head_dim, group, longest, packed=packed)


def new_scratch(case: Case) -> Scratch:
    scratch = Scratch.make(NUM_SLOTS, case.query.shape[1], KV_HEADS, case.cache.head_dim, CUDA)
    scratch.sums.fill_(torch.nan)
    scratch.stats.fill_(torch.nan)
    return scratch


def run(
    case: Case,
    rule: Rule,
    *,
    tile: AttentionTile | None = None,
    shares: int | None = None,
    programs: int | None = None,
    scratch: Scratch | None = None,
    twin: bool = False,
) -> torch.Tensor:
    """The kernel's result, with the engine's own choices unless told."""
    card, tile = card_of(CUDA), tile or tile_of(case)
    sharing = Sharing(shares or most_shares(card, KV_HEADS), NUM_SLOTS)
    work = case.work(tile, rule.window, sharing, programs or 4 * card.num_sms // KV_HEADS)
    scratch = scratch or new_scratch(case)
    out = paged_attention(case.query, case.cache, case.blocks, work, scratch, rule, tile, twin=twin)
    assert not scratch.counters.any()
    return out


def expected(case: Case, rule: Rule) -> tuple[torch.Tensor, float]:
    """float32 attention over the cache as it is stored [M, heads * head_dim], and the largest value."""
    parts, largest = [], 0.0
    for (start, count), table, row in zip(case.entries, case.tables, case.rows, strict=True):
        blocks = torch.tensor(table, device=CUDA)
        keys, values = (t.flatten(0, 1)[: start + count] for t in read(case.cache, blocks, torch.float32))
        query = case.query[row : row + count].float().unflatten(1, (KV_HEADS, -1))
        seen = visible(start, count, rule.window)
        # One KV head at a time: scores of a whole prompt would fill the card.
        heads = [one_head(query[:, h], keys[:, h], values[:, h], seen, rule.scale) for h in range(KV_HEADS)]
        parts.append(torch.stack(heads, dim=1).flatten(1))
        largest = max(largest, float(values.abs().max()))
    return torch.cat(parts), largest


def visible(start: int, count: int, window: int | None) -> torch.Tensor:
    """bool [count, start + count]: which positions each token sees."""
    queries = torch.arange(start, start + count, device=CUDA)[:, None]
    keys = torch.arange(start + count, device=CUDA)[None, :]
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)


def one_head(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor, scale: float
) -> torch.Tensor:
    """query [T, group, D], keys and values [C, D]: [T, group, D]."""
    scores = torch.einsum("tgd,cd->gtc", query, keys) * scale
    weights = torch.softmax(scores.masked_fill_(~seen, -torch.inf), dim=-1)
    return torch.einsum("gtc,cd->tgd", weights, values)


def check(case: Case, rule: Rule, got: torch.Tensor) -> None:
    wanted, largest = expected(case, rule)
    computed = case.cache.format.dtype or torch.float16
    bound = (UNIT_ROUNDOFF[computed] + SUMS) * largest + UNIT_ROUNDOFF[case.query.dtype] * wanted.abs()
    excess = ((got.float() - wanted).abs() / bound).max()
    assert bool(excess <= 1.0), f"{float(excess):.2f} times the bound"


def rule_of(case: Case, window: int | None = None) -> Rule:
    return Rule(case.cache.head_dim**-0.5, window)


@pytest.mark.parametrize("kv_format", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("step", STEPS)
def test_long_contexts(kv_format: KVFormat, step: str) -> None:
    case = make(kv_format, STEPS[step])
    check(case, rule_of(case), run(case, rule_of(case)))


@pytest.mark.parametrize("kv_format", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("block_size", [16, 32])
def test_head_and_block_sizes(kv_format: KVFormat, head_dim: int, block_size: int) -> None:
    case = make(kv_format, ((0, 200), (1500, 100), (3000, 1), (777, 1)), head_dim=head_dim, block_size=block_size)
    check(case, rule_of(case), run(case, rule_of(case)))
    decode = make(kv_format, ((3000, 1), (777, 1)), head_dim=head_dim, block_size=block_size)
    check(decode, rule_of(decode), run(decode, rule_of(decode)))


@pytest.mark.parametrize("kv_format", [FP16, BF16, INT8], ids=lambda f: f.name)
@pytest.mark.parametrize("window", [1, 100, 4096])
@pytest.mark.parametrize("step", ["decode 8", "chunks"])
def test_windows(kv_format: KVFormat, window: int, step: str) -> None:
    case = make(kv_format, STEPS[step])
    check(case, rule_of(case, window), run(case, rule_of(case, window)))


@pytest.mark.parametrize("kv_format", BYTES, ids=lambda f: f.name)
def test_bytes_under_bfloat16_queries(kv_format: KVFormat) -> None:
    case = make(kv_format, STEPS["chunks"], dtype=torch.bfloat16)
    check(case, rule_of(case), run(case, rule_of(case)))


@pytest.mark.parametrize("kv_format", [FP16, INT8], ids=lambda f: f.name)
@pytest.mark.parametrize("heads", [8, 56])
def test_groups(kv_format: KVFormat, heads: int) -> None:
    """No sharing of KV heads, and seven query heads to each."""
    case = make(kv_format, STEPS["chunks"], heads=heads)
    check(case, rule_of(case), run(case, rule_of(case)))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("packed", [False, True])
def test_every_tile_of_this_card(head_dim: int, packed: bool) -> None:
    case = make(INT8 if packed else FP16, STEPS["chunks"], head_dim=head_dim)
    for tile in attention_tiles(card_of(CUDA).arch, head_dim, packed=packed):
        check(case, rule_of(case), run(case, rule_of(case), tile=tile))


@pytest.mark.parametrize("kv_format", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("step", ["decode 1", "decode 8"])
def test_shares_that_race_leave_the_same_bits(kv_format: KVFormat, step: str) -> None:
    """Whoever ends last adds the shares up; the scratch is used again at once, as layer after layer does."""
    case = make(kv_format, STEPS[step])
    rule, scratch = rule_of(case), new_scratch(case)
    first = run(case, rule, shares=64, scratch=scratch)
    check(case, rule, first)
    for turn in range(RACES):
        programs = (132, 17, 400)[turn % 3]
        assert torch.equal(run(case, rule, shares=64, programs=programs, scratch=scratch), first)


@pytest.mark.parametrize("kv_format", FORMATS, ids=lambda f: f.name)
def test_a_row_has_the_same_bits_in_any_company(kv_format: KVFormat) -> None:
    case = make(kv_format, STEPS["decode 8"])
    rule = rule_of(case)
    whole = run(case, rule)
    for i in range(len(case.entries)):
        alone = Case(case.entries[i : i + 1], case.tables[i : i + 1], case.cache, case.query[i : i + 1])
        assert torch.equal(run(alone, rule), whole[i : i + 1])


@triton.jit
def unpack_kernel(words_ptr, low_ptr, high_ptr, KIND: tl.constexpr, ASM: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low, high = unpack(tl.load(words_ptr + offsets), KIND, tl.float16, ASM)
    tl.store(low_ptr + offsets, low)
    tl.store(high_ptr + offsets, high)


@pytest.mark.parametrize("kv_format", BYTES, ids=lambda f: f.name)
def test_assembly_unpacks_every_word_as_its_twin(kv_format: KVFormat) -> None:
    words = torch.arange(-(2**15), 2**15, device=CUDA).to(torch.int16)
    found = []
    for asm in (True, False):
        low, high = (torch.empty(2**16, dtype=torch.float16, device=CUDA) for _ in range(2))
        unpack_kernel[(64,)](words, low, high, KIND=int(kv_format.kind), ASM=asm, BLOCK=1024)
        found.append(torch.stack([low, high]).view(torch.int16))
    assert torch.equal(*found)


@pytest.mark.parametrize("kv_format", BYTES, ids=lambda f: f.name)
@pytest.mark.parametrize("step", ["decode 8", "chunks"])
def test_assembly_and_twin_agree(kv_format: KVFormat, step: str) -> None:
    """Numbers are the same, so results differ by the logarithm of scales alone, which the twin computes exactly."""
    case = make(kv_format, STEPS[step])
    rule = rule_of(case)
    fast, twin = run(case, rule), run(case, rule, twin=True)
    check(case, rule, twin)
    if not kv_format.is_scaled:
        assert torch.equal(fast, twin)


@pytest.mark.parametrize("kv_format", [FP16, BF16, plain(torch.float32), *BYTES], ids=lambda f: f.name)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("splits", "normed"), [(1, False), (4, True)])
def test_store_at_real_sizes(kv_format: KVFormat, head_dim: int, splits: int, normed: bool) -> None:
    """2,049 rows to scattered slots, the last one to none, as torch's operations store them in float32."""
    rows, blocks, block_size = 2049, 160, 16
    rng = torch.Generator(device=CUDA).manual_seed(head_dim)
    x = torch.randn(splits, rows, (HEADS + 2 * KV_HEADS) * head_dim, generator=rng, device=CUDA)
    positions = torch.randint(0, 16384, (rows,), generator=rng, device=CUDA, dtype=torch.int32)
    slots = torch.randperm(blocks * block_size, generator=rng, device=CUDA)[:rows].int()
    slots[-1] = -1
    angles = torch.outer(torch.arange(16384.0), 500000.0 ** -torch.linspace(0, 1, head_dim // 2))
    cos, sin = angles.cos().to(CUDA), angles.sin().to(CUDA)
    weights = torch.rand(2, head_dim, generator=rng, device=CUDA) + 0.5 if normed else None
    mine, theirs = (make_cache(kv_format, blocks, block_size, KV_HEADS, head_dim, CUDA) for _ in range(2))
    norms = None if weights is None else HeadNorms(weights, 1e-5)
    query = rope_store(x, HEADS, mine, Placement(positions, slots, cos, sin), torch.float32, norms)
    wanted = stored_by_torch(x[:, :-1], theirs, weights, slots[:-1], (cos, sin), positions[:-1])
    assert torch.allclose(query[:-1], wanted, rtol=1e-4, atol=1e-5)
    check_cache(mine, theirs)


def stored_by_torch(
    x: torch.Tensor,
    cache: LayerCache,
    weights: torch.Tensor | None,
    slots: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor,
) -> torch.Tensor:
    heads = Heads(HEADS, KV_HEADS, cache.head_dim, norms=weights, norm_eps=1e-5)
    cos, sin = (table[positions.long()].unsqueeze(1) for table in tables)
    return TorchOps().store(x, torch.float32, heads, cache, TorchInputs(slots.long(), cos, sin, ()))
