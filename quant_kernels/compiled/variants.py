"""Every kernel that can be launched: which weights, which tiles, which architectures.

The list follows `tuning.select` and the tables beside it, so a configuration that can be chosen is a variant here.
Sizes are no part of a variant, since kernels take them as arguments. What changes a kernel around its loop alone
(inputs that do not fill blocks, a bias, partial sums) is compiled once per tile of the commonest weight, as `odd`.
Nothing is compiled here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from quant_kernels.compiled.attention import Arguments, AttentionVariant, StoreVariant, attention_variants
from quant_kernels.elementwise.rms_norm import MAX_BLOCK, add_rms_norm_kernel, norm_options
from quant_kernels.elementwise.silu_mul import BLOCK as SILU_BLOCK
from quant_kernels.elementwise.silu_mul import NUM_WARPS as SILU_WARPS
from quant_kernels.elementwise.silu_mul import silu_mul_kernel
from quant_kernels.launching import launch_options
from quant_kernels.linear.p16 import expand
from quant_kernels.linear.p16.constants import matmul_constants, scheme_constants, tile_options
from quant_kernels.linear.p16.expand import p16_expand_kernel
from quant_kernels.linear.p16.gate_up import p16_gate_up_kernel
from quant_kernels.linear.p16.matmul import p16_matmul_kernel
from quant_kernels.sampling import sample as sampling
from quant_kernels.scheme import ACTIVATION_DTYPES, PLANE_ROWS, Scheme, ZeroKind
from quant_kernels.tuning.card import KNOWN_CARDS, SHARED_PER_BLOCK
from quant_kernels.tuning.select import (
    EXPAND_ABOVE,
    REGIMES,
    SPLITS,
    Problem,
    can_sum_in_half,
    gate_up_tile,
    matmul_tiles,
)
from quant_kernels.tuning.table import FOLDER, read_table
from quant_kernels.tuning.tile import Tile

ARCHS = tuple(SHARED_PER_BLOCK)
#: Any codebook compiles alike; this is the 4-bit NormalFloat's (Dettmers et al. 2023, appendix E), rounded.
_CODEBOOK = (
    *(-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0),
    *(0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0),
)
_POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
_TABLES = {2: "*i32", 4: "*i64"}
_COUNTS = ("M", "N", "K", "num_steps", "steps_per_split", "num_columns")


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel with one configuration, for one architecture.

    Attributes:
        kernel: name, as in `tuning`, or that of an elementwise kernel or the sampler.
        scheme: of the weight; None for kernels that read none.
        tile: None where the kernel has none.
        arch: compute capability.
        dtype: of activations.
        odd: K does not fill blocks, there is a bias, and partial sums are written.
        splits: partial sums that an elementwise kernel reads; 0 for other kernels.
        width: columns that an elementwise kernel or the sampler holds.
    """

    kernel: str
    scheme: Scheme | None
    tile: Tile | None
    arch: int
    dtype: torch.dtype
    odd: bool = False
    splits: int = 0
    width: int = 0

    @property
    def config(self) -> str:
        """Everything but the architecture, in words: the key of budgets and results."""
        dtype = str(self.dtype).removeprefix("torch.")
        if self.scheme is None:
            sums = f", {self.splits} sums" if self.splits else ""
            return f"{dtype} {self.width} columns{sums}"
        s = self.scheme
        parts = [f"w{s.bits}", dtype, f"g{s.group_size or 'K'}", s.zero.name.lower()]
        if s.scale_dtype != s.dtype:
            parts.append(f"{str(s.scale_dtype).removeprefix('torch.')} scales")
        if self.tile is not None:
            parts.append(self.tile.name)
        return " ".join([*parts, *(["odd"] if self.odd else [])])

    @property
    def weights_per_thread(self) -> float:
        """Weights that a thread unpacks per turn of the main loop, or in all where there is none; 0 without weights."""
        if self.scheme is None:
            return 0.0
        if self.tile is None:
            return PLANE_ROWS * self.scheme.planes * expand.BLOCK_N / (32 * expand.NUM_WARPS)
        halves = 2 if self.kernel == "gate_up" else 1
        per_turn = self.tile.word_rows * self.scheme.planes * self.tile.block_n * halves
        return per_turn / (32 * self.tile.num_warps)

    def arguments(self) -> Arguments:
        """Kernel, types, constants and options for `cross_compile`."""
        if self.kernel == "sample":
            return _sampling_arguments(self)
        return _elementwise_arguments(self) if self.scheme is None else _weight_arguments(self, self.scheme)


AnyVariant = Variant | AttentionVariant | StoreVariant


def row_name(variant: AnyVariant) -> str:
    """The row of a variant in the tables of budgets and figures; their columns are architectures."""
    return f"{variant.kernel} {variant.config}"


def all_variants(tables: Path = FOLDER) -> list[AnyVariant]:
    """Everything that can be launched on any architecture, each once."""
    found: dict[AnyVariant, None] = {}
    for arch, dtype in itertools.product(ARCHS, ACTIVATION_DTYPES):
        for scheme in schemes(dtype):
            found.update(dict.fromkeys(_of_scheme(scheme, arch)))
        found.update(dict.fromkeys(_elementwise(arch, dtype)))
    found.update(dict.fromkeys(_sampling()))
    found.update(dict.fromkeys(attention_variants()))
    found.update(dict.fromkeys(_of_tables(tables)))
    return list(found)


def schemes(dtype: torch.dtype) -> Iterator[Scheme]:
    """Every kind of weight that `layout.can_pack` accepts, with scales of the activations' type."""
    for bits, zero in itertools.product((4, 8), ZeroKind):
        if bits == 8 and zero in (ZeroKind.MIN, ZeroKind.CODEBOOK):
            continue
        for group in (32, 64, 128, 0):
            if group == 0 and zero in (ZeroKind.MIN, ZeroKind.CODEBOOK):
                continue
            yield make_scheme(bits, group, zero, dtype)


def make_scheme(bits: int, group_size: int, zero: ZeroKind, dtype: torch.dtype) -> Scheme:
    """A scheme by the group size that the kernels see; 0 is one group for all of K."""
    block = PLANE_ROWS * 16 // bits
    return Scheme(
        bits=bits,
        groups=max(1, block // group_size) if group_size else 1,
        blocks_per_group=max(1, group_size // block) if group_size else 0,
        zero=zero,
        zero_value=2 ** (bits - 1),
        scale_dtype=dtype,
        dtype=dtype,
        codebook=_CODEBOOK if zero == ZeroKind.CODEBOOK else None,
    )


def _of_scheme(scheme: Scheme, arch: int) -> Iterator[Variant]:
    for rows in (*REGIMES, EXPAND_ABOVE[arch]):
        for name, tile in matmul_tiles(arch, rows, scheme).items():
            yield from _of_tile(scheme, tile, arch, rows)
            if name == "base" and scheme.bits == 4 and scheme.zero == ZeroKind.CONST and scheme.group_size == 128:
                yield Variant("matmul", scheme, tile, arch, scheme.dtype, odd=True)
            if name == "base" and scheme.dtype == torch.bfloat16 and scheme.zero <= ZeroKind.INTEGER:
                # Models in bfloat16 whose quantizer wrote float16 scales.
                mixed = replace(scheme, scale_dtype=torch.float16)
                yield Variant("matmul", mixed, tile, arch, scheme.dtype)
        fused = gate_up_tile(rows, scheme)
        if fused is not None:
            yield Variant("gate_up", scheme, fused, arch, scheme.dtype)
    yield Variant("expand", scheme, None, arch, scheme.dtype)


def _of_tile(scheme: Scheme, tile: Tile, arch: int, rows: int) -> Iterator[Variant]:
    """A tile as it is, and with float16 sums where they can be asked for."""
    yield Variant("matmul", scheme, tile, arch, scheme.dtype)
    for card in KNOWN_CARDS.values():
        if card.arch == arch and can_sum_in_half(tile, Problem(rows, 0, 0, scheme), card):
            yield Variant("matmul", scheme, replace(tile, half_sums=True), arch, scheme.dtype)


def _of_tables(folder: Path) -> Iterator[Variant]:
    for path in sorted(folder.glob("*.json")):
        table = read_table(path)
        for key, tile in table.tiles():
            scheme = make_scheme(key.bits, key.group_size, ZeroKind[key.zero.upper()], getattr(torch, key.dtype))
            if key.kernel == "matmul":
                yield from _of_tile(scheme, tile, table.arch, key.rows)
            else:
                yield Variant(key.kernel, scheme, tile, table.arch, scheme.dtype)


def _elementwise(arch: int, dtype: torch.dtype) -> Iterator[Variant]:
    for width in (MAX_BLOCK // 2, MAX_BLOCK, 2 * MAX_BLOCK):
        # Before the first layer there is nothing to add.
        yield Variant("add_rms_norm", None, None, arch, dtype, splits=0, width=width)
    for splits in SPLITS:
        yield Variant("silu_mul", None, None, arch, dtype, splits=splits, width=SILU_BLOCK)
        for width in (MAX_BLOCK // 2, MAX_BLOCK, 2 * MAX_BLOCK):
            yield Variant("add_rms_norm", None, None, arch, dtype, splits=splits, width=width)


def _sampling() -> Iterator[Variant]:
    """Logits come as the last matmul leaves them, or in float32 once they have been edited."""
    for arch, dtype in itertools.product(ARCHS, _POINTERS):
        yield Variant("sample", None, None, arch, dtype, width=sampling.BLOCK)


def _weight_arguments(variant: Variant, scheme: Scheme) -> Arguments:
    tile = variant.tile
    pointers = _weight_types(scheme)
    if tile is None:
        block = {"BN": expand.BLOCK_N}
        return p16_expand_kernel, pointers, {**scheme_constants(scheme), **block}, launch_options(expand.NUM_WARPS)
    values = {
        **matmul_constants(scheme, tile),
        "EVEN_K": not variant.odd,
        "HAS_BIAS": variant.odd,
        "BM": tile.block_m,
        "BN": tile.block_n,
    }
    if variant.kernel == "gate_up":
        return p16_gate_up_kernel, pointers, values, tile_options(tile)
    if variant.odd:
        pointers["out_ptr"] = _POINTERS[torch.float32]
    values |= {"ROWS": tile.word_rows, "GROUP_M": tile.group_m}
    return p16_matmul_kernel, pointers, values, tile_options(tile)


def _weight_types(scheme: Scheme) -> dict[str, str]:
    stored, scale = _POINTERS[scheme.dtype], _POINTERS[scheme.scale_dtype]
    offset = stored if scheme.zero == ZeroKind.INTEGER else scale
    return {
        "x_ptr": stored,
        "words_ptr": "*i16",
        "scales_ptr": _TABLES.get(scheme.groups, scale),
        "offsets_ptr": _TABLES.get(scheme.groups, offset),
        "bias_ptr": stored,
        "out_ptr": stored,
        **_sizes(_COUNTS, ("stride_x", "stride_words", "stride_out")),
    }


def _elementwise_arguments(variant: Variant) -> Arguments:
    stored = _POINTERS[variant.dtype]
    sums = stored if variant.splits <= 1 else _POINTERS[torch.float32]
    types = {"x_ptr": sums, "places_ptr": "*i32", "out_ptr": stored, **_sizes(_COUNTS, ("stride_split",))}
    values = {"SPLIT_K": variant.splits, "PERMUTED": True}
    if variant.kernel == "silu_mul":
        return silu_mul_kernel, types, {**values, "BLOCK": variant.width}, launch_options(SILU_WARPS)
    types |= {"residual_ptr": stored, "weight_ptr": stored, "eps": "fp32"}
    block = min(MAX_BLOCK, variant.width)
    values |= {"BLOCK": block, "CHUNKS": variant.width // block}
    return add_rms_norm_kernel, types, values, norm_options(block)


def _sampling_arguments(variant: Variant) -> Arguments:
    per_row = ("temperature_ptr", "min_p_ptr", "top_k_ptr", "top_p_ptr", "uniform_ptr")
    types = {
        "logits_ptr": _POINTERS[variant.dtype],
        **dict.fromkeys(per_row, "*fp64"),
        "values_ptr": "*fp32",
        "ids_ptr": "*i32",
        "tokens_ptr": "*i32",
        **_sizes(("vocab", "stride_row")),
    }
    values = {
        "CAPACITY": sampling.CAPACITY,
        "COPY_BLOCK": sampling.COPY_BLOCK,
        "BLOCK": variant.width,
        "PIVOTS": sampling.PIVOTS,
    }
    return sampling.sample_kernel, types, values, sampling.sample_options()


def _sizes(*names: Iterable[str]) -> dict[str, str]:
    return dict.fromkeys(itertools.chain(*names), "i32")
