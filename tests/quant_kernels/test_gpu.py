"""What only a GPU can show: real sizes, the assembly against its twin bit for bit, graphs, and memory.

Expected results are computed on the device, in float32 without tensor cores' tf32.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from quant_kernels.compiled.variants import Variant, all_variants, schemes
from quant_kernels.elementwise import reference
from quant_kernels.elementwise.rms_norm import add_rms_norm
from quant_kernels.elementwise.silu_mul import silu_mul
from quant_kernels.linear.p16.expand import expand
from quant_kernels.linear.p16.gate_up import gate_up
from quant_kernels.linear.p16.layout import pack, unpack
from quant_kernels.linear.p16.matmul import matmul
from quant_kernels.linear.p16.prepared import P16Linear
from quant_kernels.packed_weight import PackedWeight
from quant_kernels.packing import pack_codes
from quant_kernels.reference import linear
from quant_kernels.sampling import reference as sampling_reference
from quant_kernels.sampling.sample import CAPACITY
from quant_kernels.sampling.sample import sample as sample_rows
from quant_kernels.scheme import Scheme, ZeroKind
from quant_kernels.tolerance import UNIT_ROUNDOFF, Error, bound, error
from quant_kernels.tuning.card import card_of
from quant_kernels.tuning.select import EXPAND, Selector
from quant_kernels.tuning.tile import Tile

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
DTYPES = (torch.float16, torch.bfloat16)
KINDS = ("const", "zeros", "mins", "codebook")
#: Llama-3-8B's linears, a head, and a size that fills no tile.
SHAPES = [(4096, 6144), (4096, 28672), (14336, 4096), (4096, 128256), (4000, 1000)]
ROWS = (1, 16, 17, 64, 100, 300)


def weight(
    in_features: int, out_features: int, group: int, kind: str, dtype: torch.dtype, bits: int = 4, seed: int = 0
) -> PackedWeight:
    """A random record on the device; as tests/quant_kernels/records.py, which is made for small ones."""
    rng = torch.Generator(device=CUDA).manual_seed(seed)
    table = (-(-in_features // group), out_features)
    spread = in_features**-0.5 / 2 ** (bits - 1)
    codes = torch.randint(0, 2**bits, (in_features, out_features), generator=rng, device=CUDA, dtype=torch.uint8)
    scales = ((torch.rand(table, generator=rng, device=CUDA) + 0.5) * spread).to(dtype)
    zeros = torch.randint(1, 2**bits, table, generator=rng, device=CUDA, dtype=torch.int32).to(torch.uint8)
    mins = (-(2.0 ** (bits - 1)) * scales.float() + torch.randn(table, generator=rng, device=CUDA) * spread).to(dtype)
    return PackedWeight(
        bits=bits,
        codes=pack_codes(codes, bits),
        scales=scales,
        group_size=group,
        in_features=in_features,
        out_features=out_features,
        zero_const=2 ** (bits - 1) if kind == "const" else None,
        zeros=zeros if kind == "zeros" else None,
        mins=mins if kind == "mins" else None,
        codebook=torch.randn(16, generator=rng, device=CUDA) if kind == "codebook" else None,
    )


def of_scheme(scheme: Scheme, in_features: int, out_features: int) -> PackedWeight:
    kind = dict(zip(ZeroKind, KINDS, strict=True))[scheme.zero]
    return weight(in_features, out_features, scheme.group_size or in_features, kind, scheme.scale_dtype, scheme.bits)


def random_x(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    rng = torch.Generator(device=CUDA).manual_seed(rows)
    return torch.randn(rows, columns, generator=rng, device=CUDA).to(dtype)


def check(got: torch.Tensor, expected: torch.Tensor, allowed: Error) -> None:
    found = error(got, expected)
    assert found.within(allowed), f"{found} exceeds {allowed}"


def all_schemes() -> Iterator[Scheme]:
    for dtype in DTYPES:
        yield from schemes(dtype)


def scheme_name(scheme: Scheme) -> str:
    dtype = str(scheme.dtype).removeprefix("torch.")
    return f"w{scheme.bits} {dtype} g{scheme.group_size or 'K'} {scheme.zero.name.lower()}"


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("kind", ["const", "zeros"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_real_sizes(shape: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    record = weight(*shape, 128, kind, dtype)
    made = P16Linear.of(record, dtype, CUDA, Selector.of(CUDA))
    for rows in ROWS:
        x = random_x(rows, shape[0], dtype)
        choice = made.choice(rows)
        scaled = choice.kernel == EXPAND or (choice.tile is not None and choice.tile.scale_weight)
        allowed = bound(made.weight.scheme, dtype, scale_weight=scaled)
        # One rounding more where the sums are added up outside.
        check(made(x), linear(x, record), Error(2 * allowed.worst, 2 * allowed.mean))
    del made, record
    torch.cuda.empty_cache()


@pytest.mark.parametrize("scheme", list(all_schemes()), ids=scheme_name)
def test_assembly_equals_its_twin_bit_for_bit(scheme: Scheme) -> None:
    record = of_scheme(scheme, 1024, 384)
    packed = pack(record, scheme.dtype, CUDA)
    x = random_x(16, 1024, scheme.dtype)
    tile = Tile(16, 128)
    assert torch.equal(matmul(x, packed, tile, 2), matmul(x, packed, tile, 2, twin=True))
    assert torch.equal(expand(packed, 0, 384), expand(packed, 0, 384, twin=True))
    check(
        matmul(x, packed, tile)[0], linear(x, record), bound(scheme, scheme.dtype, scale_weight=False),
    )  # fmt: skip


def variants_here(dtype: torch.dtype) -> list[Variant]:
    """Every configuration of the two matmul kernels that can be selected on this card."""
    arch = card_of(CUDA).arch
    weights = (v for v in all_variants() if isinstance(v, Variant))
    return [v for v in weights if v.arch == arch and v.dtype == dtype and v.tile is not None]


def run(variant: Variant, x: torch.Tensor, record: PackedWeight, *, twin: bool) -> torch.Tensor:
    assert variant.tile is not None
    packed = pack(record, variant.dtype, CUDA)
    if variant.kernel == "gate_up":
        return gate_up(x, packed, variant.tile, twin=twin)
    return matmul(x, packed, variant.tile, twin=twin)[0]


@pytest.mark.every_tile
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_every_tile_of_this_card(dtype: torch.dtype) -> None:
    """Each configuration against the reference and its twin, at a size with partial last tiles."""
    failed = []
    for variant in variants_here(dtype):
        scheme, tile = variant.scheme, variant.tile
        assert scheme is not None
        assert tile is not None
        record = of_scheme(scheme, 960, 512)
        x = random_x(tile.block_m + 1, 960, scheme.dtype)
        expected = linear(x, record)
        allowed = bound(scheme, scheme.dtype, scale_weight=tile.scale_weight, half_sums=tile.half_sums)
        if variant.kernel == "gate_up":
            gate, up = expected.chunk(2, dim=-1)
            expected, allowed = F.silu(gate) * up, Error(3 * allowed.worst, 3 * allowed.mean)
        found = run(variant, x, record, twin=False)
        if not error(found, expected).within(allowed):
            failed.append(f"{variant.kernel} {variant.config}: {error(found, expected)} exceeds {allowed}")
        if not torch.equal(found, run(variant, x, record, twin=True)):
            failed.append(f"{variant.kernel} {variant.config}: assembly and twin differ")
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_splits_repeat_and_graphs_replay(dtype: torch.dtype) -> None:
    record = weight(4096, 4096, 128, "const", dtype)
    made = P16Linear.of(record, dtype, CUDA, Selector.of(CUDA))
    x = random_x(4, 4096, dtype)
    first = made.partial_sums(x)
    assert all(torch.equal(made.partial_sums(x), first) for _ in range(20))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = made.partial_sums(x)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [4096, 8192, 16384])
def test_elementwise_at_real_sizes(dtype: torch.dtype, columns: int) -> None:
    rounding = Error(UNIT_ROUNDOFF[dtype] + 2e-5, UNIT_ROUNDOFF[dtype] / 2 + 2e-5)
    sums = torch.randn(8, 33, columns, device=CUDA)
    residual, scale = random_x(33, columns, dtype), random_x(1, columns, dtype)[0]
    perm = torch.randperm(columns, device=CUDA)
    expected, total = reference.add_rms_norm(sums, residual, scale, 1e-5, perm)
    normed = add_rms_norm(sums, residual, scale, 1e-5, torch.argsort(perm).int())
    # A row that does not fit the registers is read back rounded.
    check(normed, expected, Error(2 * rounding.worst, 2 * rounding.mean))
    check(residual, total, rounding)
    gates = torch.randn(4, 33, 2 * columns, device=CUDA)
    check(silu_mul(gates, dtype, torch.argsort(perm).int()), reference.silu_mul(gates, perm), rounding)


#: (temperature, min_p, top_k, top_p); at temperature 50 more is kept than the copy of a row's likeliest holds.
SETTINGS = [
    (0.0, 0.0, 0, 1.0), (1.0, 0.0, 0, 1.0), (0.7, 0.05, 0, 1.0), (1.0, 0.0, 40, 1.0), (1.0, 0.0, 0, 0.9),
    (0.8, 0.02, 50, 0.95), (50.0, 0.0, 0, 0.9), (1.0, 0.0, 100_000, 0.8),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES])
def test_sampling_at_real_sizes(dtype: torch.dtype) -> None:
    """64 rows of Llama-3's vocabulary: the drawn token's step in the reference's distribution holds the number."""
    rows, vocab = 64, 128256
    logits = (random_x(rows, vocab, torch.float32) * 3).to(dtype)
    settings = [SETTINGS[row % len(SETTINGS)] for row in range(rows)]
    columns = [torch.tensor(column, device=CUDA, dtype=torch.float64) for column in zip(*settings, strict=True)]
    uniform = torch.rand(rows, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tokens = sample_rows(logits, *columns, uniform.to(CUDA))
    assert torch.equal(sample_rows(logits[32:], *(c[32:] for c in columns), uniform[32:].to(CUDA)), tokens[32:])
    most = 0
    for row, (token, (temperature, *filters)) in enumerate(zip(tokens.tolist(), settings, strict=True)):
        if temperature == 0.0:
            assert token == int((logits[row] == logits[row].max()).nonzero()[0])
            continue
        kept = sampling_reference.kept_weights(logits[row], temperature, *filters)
        most = max(most, int((kept > 0).sum()))
        ends = kept.cumsum(0) / kept.sum()
        low, high = ends[token] - kept[token] / kept.sum(), ends[token]
        assert kept[token] > 0
        assert low - 1e-5 <= uniform[row] <= high + 1e-5
    assert most > CAPACITY


def test_packing_fits_beside_the_layer() -> None:
    record = weight(8192, 57344, 128, "zeros", torch.float16)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    packed = pack(record, torch.float16, CUDA)
    extra = torch.cuda.max_memory_allocated() - before - packed.num_bytes
    assert extra < packed.num_bytes
    back = unpack(packed)
    assert torch.equal(back.codes, record.codes)
    assert torch.equal(back.scales, record.scales)
