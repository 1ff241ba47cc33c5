"""A linear as the tensors of a checkpoint format: PackedWeight to AWQ, GPTQ, compressed-tensors or dense.

The modules in `formats` have the layouts; this is the way back. Invariant: what is written means what the record means,
bit for bit (dense: rounded once to the type asked for); what a format cannot express is refused by `obstacle`, with
the reason, before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import gcd

import torch

from converters.errors import CheckpointError
from converters.export_formats import MULTIPLES, ExportFormat
from converters.formats.awq import pack_awq_codes, pack_awq_columns
from converters.formats.bitfields import pack_columns
from quant_kernels.packed_weight import DenseWeight, PackedWeight
from quant_kernels.packing import expand_zeros, gather_rows
from quant_kernels.reference import to_dense

_BITS = {"awq": (4,), "gptq": (4, 8), "compressed-tensors": (4, 8)}
_CHANNEL = -1


@dataclass(frozen=True, slots=True)
class ExportScheme:
    """What a format's config says of all quantized linears.

    Attributes:
        group_size: -1 if every linear is one group.
        symmetric: every zero point is the middle of the range.
        has_order: some linear has an activation order.
    """

    format: ExportFormat
    bits: int
    group_size: int
    symmetric: bool
    has_order: bool


@dataclass(frozen=True, slots=True)
class LinearTraits:
    """What a format's config needs to know of one linear; the data can be let go of."""

    name: str
    bits: int
    group_size: int
    in_features: int
    symmetric: bool
    has_order: bool

    @staticmethod
    def of(name: str, weight: PackedWeight) -> LinearTraits:
        """Of a record that the format can express."""
        middle = 2 ** (weight.bits - 1)
        zeros = weight.zeros
        symmetric = weight.zero_const == middle or (zeros is not None and bool((zeros == middle).all()))
        size = min(weight.group_size, weight.in_features)
        # An order says which inputs share a scale; in one group they all do.
        has_order = weight.perm is not None and size < weight.in_features
        return LinearTraits(name, weight.bits, size, weight.in_features, symmetric, has_order)


def obstacle(weight: PackedWeight, format: ExportFormat) -> str | None:
    """Why `format` cannot express a linear; None if it can."""
    if format == "dense":
        return None
    if weight.mins is not None:
        return "its groups have a float minimum in place of a zero point (as GGUF's Q4_1)"
    if weight.codebook is not None:
        return "its codes stand for the entries of a table"
    if weight.bits not in _BITS[format]:
        return f"it has {weight.bits} bits, and {format} has {' or '.join(map(str, _BITS[format]))}"
    rows, columns = MULTIPLES[format]
    if weight.in_features % rows or weight.out_features % columns:
        sizes = f"{weight.in_features} inputs and {weight.out_features} outputs"
        return f"it has {sizes}, and {format} packs multiples of {rows} and {columns}"
    if format == "awq" and weight.perm is not None:
        return "it has an activation order"
    if format != "gptq" and weight.in_features % min(weight.group_size, weight.in_features):
        return f"its last group is short ({weight.in_features} inputs in groups of {weight.group_size})"
    if format == "gptq" and not _fits_version_1(weight):
        return "it has zero points of 0, which GPTQ's first version, the one that all programs read, cannot hold"
    return _scale_obstacle(weight.scales, format)


def _fits_version_1(weight: PackedWeight) -> bool:
    """Zero points are stored less one."""
    return weight.zero_const != 0 and (weight.zeros is None or bool((weight.zeros >= 1).all()))


def _scale_obstacle(scales: torch.Tensor, format: ExportFormat) -> str | None:
    if _exact_dtype(scales, format) is None:
        return f"some of its scales ({str(scales.dtype).removeprefix('torch.')}) are not exact in float16"
    return None


def _exact_dtype(scales: torch.Tensor, format: ExportFormat) -> torch.dtype | None:
    """The type that the format has for scales and that holds all of them, None if none does."""
    if format == "compressed-tensors" and scales.dtype in (torch.float16, torch.bfloat16):
        return scales.dtype
    wanted = (torch.float16,) if format != "compressed-tensors" else (torch.float16, torch.bfloat16)
    return next((dtype for dtype in wanted if torch.equal(scales.to(dtype).to(scales.dtype), scales)), None)


def scheme_of(traits: Sequence[LinearTraits], format: ExportFormat) -> ExportScheme | str:
    """What the config will say, or why one config cannot say it of all linears together.

    Groups of different sizes become groups of the largest size that divides all: each scale is written as often as
    needed, which loses nothing.
    """
    assert traits, "a checkpoint without a quantized linear has no scheme"
    all_bits = sorted({trait.bits for trait in traits})
    if len(all_bits) > 1:
        return f"its linears have {' and '.join(map(str, all_bits))} bits, and the config names one number"
    if all(trait.group_size == trait.in_features for trait in traits):
        size = _CHANNEL
    else:
        size = gcd(*(trait.group_size for trait in traits))
        short = [
            trait for trait in traits if trait.group_size % size or (trait.in_features % size and format != "gptq")
        ]
        if size < 8 or short:
            sizes = ", ".join(map(str, sorted({trait.group_size for trait in traits})))
            return f"its linears have groups of {sizes}, which have no common size"
    return ExportScheme(
        format,
        bits=all_bits[0],
        group_size=size,
        symmetric=all(trait.symmetric for trait in traits),
        has_order=any(trait.has_order for trait in traits),
    )


def regroup(weight: PackedWeight, group_size: int) -> PackedWeight:
    """The same weight in smaller groups, whose size divides that of the old ones. Exact."""
    size = min(weight.group_size, weight.in_features)
    if group_size in (_CHANNEL, size):
        return weight
    times, num_groups = size // group_size, -(-weight.in_features // group_size)

    def spread(table: torch.Tensor | None) -> torch.Tensor | None:
        return None if table is None else table.repeat_interleave(times, dim=0)[:num_groups]

    scales = spread(weight.scales)
    assert scales is not None, "records have scales"
    return replace(weight, scales=scales, zeros=spread(weight.zeros), mins=spread(weight.mins), group_size=group_size)


def linear_tensors(
    name: str, weight: PackedWeight | DenseWeight, scheme: ExportScheme | None, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of module `name`.

    Args:
        scheme: of the checkpoint; None writes the weight dense.
        dtype: of dense weights and of biases; None keeps what they have (float32 for what was packed).

    Raises:
        CheckpointError: if `dtype` is too narrow for a value.
    """
    if isinstance(weight, DenseWeight) or scheme is None or scheme.format == "dense":
        dense = weight if isinstance(weight, DenseWeight) else to_dense(weight, torch.float32)
        return {f"{name}.weight": cast(f"{name}.weight", dense.weight, dtype), **_bias(name, weight.bias, dtype)}
    regular = regroup(weight, scheme.group_size)
    writer = {"awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed}[scheme.format]
    return {**writer(name, regular, scheme), **_bias(name, weight.bias, dtype)}


def _awq(name: str, weight: PackedWeight, scheme: ExportScheme) -> dict[str, torch.Tensor]:
    return {
        f"{name}.qweight": pack_awq_codes(weight.codes),
        f"{name}.qzeros": pack_awq_columns(expand_zeros(weight)),
        f"{name}.scales": weight.scales.to(torch.float16),
    }


def _gptq(name: str, weight: PackedWeight, scheme: ExportScheme) -> dict[str, torch.Tensor]:
    """Version 1: zero points are stored less one, and the order is always there."""
    codes, groups = _in_layer_order(weight)
    return {
        f"{name}.qweight": codes,
        f"{name}.qzeros": pack_columns(expand_zeros(weight) - 1, weight.bits),
        f"{name}.scales": weight.scales.to(torch.float16),
        f"{name}.g_idx": groups,
    }


def _compressed(name: str, weight: PackedWeight, scheme: ExportScheme) -> dict[str, torch.Tensor]:
    codes, groups = _in_layer_order(weight)
    dtype = _exact_dtype(weight.scales, "compressed-tensors")
    assert dtype is not None, "the caller asked for obstacles"
    tensors = {
        f"{name}.weight_packed": codes.t(),
        f"{name}.weight_scale": weight.scales.t().to(dtype),
        f"{name}.weight_shape": torch.tensor([weight.out_features, weight.in_features]),
    }
    if not scheme.symmetric:
        per_word = 32 // weight.bits
        padding = (0, -weight.out_features % per_word)
        zeros = torch.nn.functional.pad(expand_zeros(weight), padding)
        tensors[f"{name}.weight_zero_point"] = pack_columns(zeros, weight.bits).t()
    if scheme.has_order:
        tensors[f"{name}.weight_g_idx"] = groups
    return {key: tensor.contiguous() for key, tensor in tensors.items()}


def _in_layer_order(weight: PackedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes with rows in the layer's own order, and the group of each row, int32 [in]."""
    groups = torch.arange(weight.in_features, dtype=torch.int32) // weight.group_size
    if weight.perm is None:
        return weight.codes, groups
    places = torch.argsort(weight.perm.long())
    return gather_rows(weight.codes, weight.bits, places), groups[places]


def _bias(name: str, bias: torch.Tensor | None, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    return {} if bias is None else {f"{name}.bias": cast(f"{name}.bias", bias, dtype)}


def cast(name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Tensor `name` in another type; None keeps its own.

    Raises:
        CheckpointError: if a finite value would become infinite.
    """
    if dtype is None or tensor.dtype == dtype:
        return tensor
    found = tensor.to(dtype)
    if bool((found.isinf() & tensor.isfinite()).any()):
        largest = float(tensor[tensor.isfinite()].abs().max())
        raise CheckpointError(
            f"{name} holds values up to {largest:.6g}, and {str(dtype).removeprefix('torch.')} ends at "
            f"{torch.finfo(dtype).max:.6g}; bfloat16 (qengine convert --dtype bfloat16) has room for them"
        )
    return found


def joined(reasons: Iterable[tuple[str, str]], most: int = 3) -> str:
    """Module names with their reasons, for one message: each reason once, with the modules that it holds for."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons:
        by_reason.setdefault(reason, []).append(name)
    return "; ".join(
        f"{', '.join(names[:most])}{f' and {len(names) - most} more' if len(names) > most else ''}: {reason}"
        for reason, names in by_reason.items()
    )
