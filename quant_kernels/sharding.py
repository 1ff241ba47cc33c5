"""Cutting a linear for several ranks: along its outputs, or along its inputs.

Outputs are columns of every table, so any range is a slice. Inputs share scales in groups, and a cut has three forms::

    between groups        rows of codes, scales and zero points are slices
    within a group        groups become smaller ones that start at the cut, their scales repeated
    activation order      the rows of a rank's inputs are spread over all groups. They keep their order; what is left
                          of a group is filled up to whole chunks of 32 rows with padding, and a chunk is a group:

        perm      | 5 9 . .  | 2 6 11 . | 0 . . .  |      . is padding: no input feeds it (here 4 rows stand for 32)
        scales    | of group | of group | of group |
                  |    0     |    1     |    3     |      rows of scales repeated, or left out with their group

The third form also takes cuts that leave groups no kernel runs (`footprint.group_after_cut`).
Invariant: nothing is rounded. The parts of a linear that is cut along its outputs, side by side, are the linear; those
of one that is cut along its inputs add up to it.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from quant_kernels.footprint import CHUNK, group_after_cut
from quant_kernels.packed_weight import CODES_PER_WORD, PADDING, DenseWeight, PackedWeight
from quant_kernels.packing import gather_rows


def slice_outputs(weight: PackedWeight | DenseWeight, outputs: range) -> PackedWeight | DenseWeight:
    """The linear with some neighbouring outputs only, and their biases. Shares no memory with a larger one."""
    if len(outputs) == weight.out_features:
        return weight
    bias = None if weight.bias is None else _cut(weight.bias, 0, outputs)
    if isinstance(weight, DenseWeight):
        return DenseWeight(_cut(weight.weight, 0, outputs), bias)
    return replace(
        weight,
        codes=_cut(weight.codes, 1, outputs),
        scales=_cut(weight.scales, 1, outputs),
        zeros=None if weight.zeros is None else _cut(weight.zeros, 1, outputs),
        mins=None if weight.mins is None else _cut(weight.mins, 1, outputs),
        out_features=len(outputs),
        bias=bias,
    )


def slice_inputs(weight: PackedWeight | DenseWeight, inputs: range, *, with_bias: bool) -> PackedWeight | DenseWeight:
    """The linear for some neighbouring inputs only. Shares no memory with a larger one.

    Args:
        inputs: of the layer, whatever the order in which the record has them.
        with_bias: for one rank alone, since the ranks' results are added up.
    """
    bias = weight.bias if with_bias else None
    if isinstance(weight, DenseWeight):
        whole = len(inputs) == weight.in_features
        return DenseWeight(weight.weight if whole else _cut(weight.weight, 1, inputs), bias)
    if weight.perm is None:
        if len(inputs) == weight.in_features:
            return replace(weight, bias=bias)
        group_size = group_after_cut(weight.bits, weight.group_size, weight.in_features, inputs)
        if group_size is not None:
            return replace(_regular_part(weight, inputs, group_size), bias=bias)
    elif len(inputs) == weight.num_inputs:
        return replace(weight, bias=bias)
    return replace(_padded_part(weight, inputs), bias=bias)


def _cut(tensor: torch.Tensor, dim: int, part: range) -> torch.Tensor:
    return tensor.narrow(dim, part.start, len(part)).clone(memory_format=torch.contiguous_format)


def _is_one_group(weight: PackedWeight) -> bool:
    return weight.group_size >= weight.in_features


def _regular_part(weight: PackedWeight, inputs: range, group_size: int) -> PackedWeight:
    """Whole words of rows, in groups of `group_size` from the cut on."""
    per_word = CODES_PER_WORD[weight.bits]
    firsts = torch.arange(inputs.start, inputs.stop, group_size, device=weight.codes.device)
    rows = torch.zeros_like(firsts[:1]) if _is_one_group(weight) else firsts // weight.group_size
    words = range(inputs.start // per_word, inputs.stop // per_word)
    return _assembled(weight, _cut(weight.codes, 0, words), rows, group_size)


def _padded_part(weight: PackedWeight, inputs: range) -> PackedWeight:
    """The rows of some inputs in their stored order, every group filled up to whole chunks."""
    device = weight.codes.device
    perm = torch.arange(weight.in_features, device=device) if weight.perm is None else weight.perm.long()
    stored = torch.nonzero((perm >= inputs.start) & (perm < inputs.stop)).flatten()
    groups = stored // weight.group_size
    counts = torch.bincount(groups, minlength=weight.num_groups)
    chunks = (counts + CHUNK - 1) // CHUNK
    # A row's place is its group's first place, and how many rows of the group come before it.
    places = torch.arange(len(stored), device=device) + (_starts(chunks * CHUNK) - _starts(counts))[groups]
    num_rows = int(chunks.sum()) * CHUNK
    source = torch.zeros(num_rows, dtype=torch.int64, device=device)
    source[places] = stored
    local = torch.full((num_rows,), PADDING, dtype=torch.int32, device=device)
    local[places] = (perm[stored] - inputs.start).int()
    table_rows = torch.repeat_interleave(torch.arange(weight.num_groups, device=device), chunks)
    codes = gather_rows(weight.codes, weight.bits, source)
    if _is_one_group(weight):
        return _assembled(weight, codes, table_rows[:1], num_rows, local)
    return _assembled(weight, codes, table_rows, CHUNK, local)


def _starts(counts: torch.Tensor) -> torch.Tensor:
    """Where each of the neighbouring runs of so many items begins."""
    return counts.cumsum(0) - counts


def _assembled(
    weight: PackedWeight, codes: torch.Tensor, groups: torch.Tensor, group_size: int, perm: torch.Tensor | None = None
) -> PackedWeight:
    """A record of `codes` whose group i has the scales of group groups[i] of `weight`."""
    return replace(
        weight,
        codes=codes,
        scales=weight.scales[groups],
        zeros=None if weight.zeros is None else weight.zeros[groups],
        mins=None if weight.mins is None else weight.mins[groups],
        group_size=group_size,
        in_features=codes.shape[0] * CODES_PER_WORD[weight.bits],
        perm=perm,
    )
