"""The specification in plain torch: what a PackedWeight means. Every kernel is tested against this.

Invariant: integer differences are exact and there is one rounding per weight, in the dtype asked for.
It is not fast and nothing calls it while serving, except to expand a weight that has no kernel.
"""

from __future__ import annotations

import torch

from quant_kernels.packed_weight import DenseWeight, PackedWeight
from quant_kernels.packing import expand_zeros, input_places, unpack_codes


def group_of_row(weight: PackedWeight) -> torch.Tensor:
    """int64 [K]: the scale row that each stored row uses."""
    rows = torch.arange(weight.in_features, device=weight.codes.device)
    return torch.div(rows, weight.group_size, rounding_mode="floor")


def dequantize(weight: PackedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weight as [inputs, N] in `dtype`, rows in the layer's own order (activation order and padding undone).

    Computed in float32 and rounded once to `dtype`, so a float32 result is the exact one of formats with 16-bit
    scales: an integer of at most 9 bits times an 11-bit mantissa fits float32.
    """
    group = group_of_row(weight)
    codes = unpack_codes(weight.codes, weight.bits)
    scales = weight.scales.float()[group]
    if weight.codebook is not None:
        values = weight.codebook.float()[codes.long()] * scales
    elif weight.mins is not None:
        values = codes.float() * scales + weight.mins.float()[group]
    else:
        values = (codes.float() - expand_zeros(weight).float()[group]) * scales
    if weight.perm is not None:
        values = values[input_places(weight.perm)]
    return values.to(dtype)


def to_dense(weight: PackedWeight | DenseWeight, dtype: torch.dtype) -> DenseWeight:
    """Any weight as a DenseWeight [N, K] in `dtype`."""
    if isinstance(weight, DenseWeight):
        bias = None if weight.bias is None else weight.bias.to(dtype)
        return DenseWeight(weight.weight.to(dtype), bias)
    bias = None if weight.bias is None else weight.bias.to(dtype)
    return DenseWeight(dequantize(weight, dtype).t().contiguous(), bias)


def linear(x: torch.Tensor, weight: PackedWeight | DenseWeight) -> torch.Tensor:
    """The specification of every linear: x [M, K] times the weight plus bias, all in float32."""
    dense = to_dense(weight, torch.float32)
    y = x.float() @ dense.weight.t()
    return y if dense.bias is None else y + dense.bias
