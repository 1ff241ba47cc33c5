"""Activation order: rows whose groups are named one by one, as GPTQ and compressed-tensors store them.

Invariant: nothing is rounded. Rows that fill whole groups become a record with a `perm`; groups of unequal sizes, which
a record cannot express, become dense, exactly.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from converters.errors import CheckpointError
from converters.files import shown
from converters.report import Notices
from converters.source import LinearSlot, Weight
from converters.tensors import ReadableCheckpoint
from quant_kernels.packed_weight import DenseWeight, PackedWeight
from quant_kernels.packing import gather_rows, unpack_codes

#: An entry of g_idx that was never set.
_UNSET = -1


def read_group_of_row(
    name: str, slot: LinearSlot, num_groups: int, group_size: int, checkpoint: ReadableCheckpoint, notices: Notices
) -> torch.Tensor | None:
    """g_idx as int64 [in], or None where row k simply uses group k // group_size."""
    if num_groups == 1 or name not in checkpoint.tensors:
        return None
    group_of_row = checkpoint.read(name).to(torch.int64)
    low, high = int(group_of_row.min()), int(group_of_row.max())
    if low == high == _UNSET:
        return None
    if low < 0 or high >= num_groups:
        raise CheckpointError(
            f"{checkpoint.path}: {shown(name)} holds groups from {low} to {high}, expected 0 to {num_groups - 1}; "
            "the file is damaged"
        )
    if high == 0:
        notices.warn("empty g_idx", f"{name} is all zero although there are several groups; ignoring it")
        return None
    natural = torch.arange(slot.in_features) // group_size
    return None if torch.equal(group_of_row, natural) else group_of_row


def ordered_weight(
    slot: LinearSlot,
    *,
    bits: int,
    codes: torch.Tensor,
    scales: torch.Tensor,
    group_size: int,
    zero_const: int | None,
    zeros: torch.Tensor | None,
    group_of_row: torch.Tensor | None,
    bias: torch.Tensor | None,
    origin: Mapping[str, str],
    notices: Notices,
) -> Weight:
    """The record of a linear whose `codes` lie in the layer's own order of rows: sorted by group, if there is an order.

    Args:
        bits: of the record, 4 or 8; `codes` int32 [in * bits / 32, out].
        group_of_row: int64 [in], as `read_group_of_row` says.
    """
    order = None if group_of_row is None else torch.argsort(group_of_row, stable=True)
    if group_of_row is not None and order is not None and not _is_regular(group_of_row[order], group_size):
        notices.warn(
            "irregular groups", f"{slot.name} has groups of unequal sizes; such layers run unquantized, exactly"
        )
        zeros = torch.full(scales.shape, zero_const or 0, dtype=torch.uint8) if zeros is None else zeros
        return DenseWeight(_expand(codes, bits, scales, zeros, group_of_row), bias)
    return PackedWeight(
        bits=bits,
        codes=codes if order is None else gather_rows(codes, bits, order),
        scales=scales,
        group_size=group_size,
        in_features=slot.in_features,
        out_features=slot.out_features,
        zero_const=zero_const,
        zeros=zeros,
        perm=None if order is None else order.to(torch.int32),
        bias=bias,
        origin=dict(origin),
    )


def _is_regular(sorted_groups: torch.Tensor, group_size: int) -> bool:
    """Whether the sorted rows fill one group after the other, the last one being perhaps short."""
    return torch.equal(sorted_groups, torch.arange(len(sorted_groups)) // group_size)


def _expand(
    codes: torch.Tensor, bits: int, scales: torch.Tensor, zeros: torch.Tensor, group_of_row: torch.Tensor
) -> torch.Tensor:
    """float32 [out, in], exact: a small integer times a scale of 11 significant bits."""
    steps = unpack_codes(codes, bits).float() - zeros.float()[group_of_row]
    return (steps * scales.float()[group_of_row]).t().contiguous()
