"""Quantize one decoder layer: AWQ's factors, then the codes of each group of linears, in the order in which they run.

A group's inputs are taken from the layer as quantized so far. Invariant: when a layer is done its module holds exactly
what the records and tensors of the result say, so that running it gives the next layer's inputs.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from converters.quantizers.awq import fold, search_factors
from converters.quantizers.base import (
    LayerInputs,
    LayerResult,
    LayerView,
    LinearReport,
    QuantizationError,
    QuantSettings,
)
from converters.quantizers.hessian import collect
from converters.quantizers.linear import make_problem, quantize_linear, rounding_errors
from converters.quantizers.recipe import RECIPES, Recipe
from quant_kernels.packed_weight import PackedWeight
from quant_kernels.reference import dequantize


def quantize_layer(layer: LayerView, inputs: LayerInputs | None, settings: QuantSettings) -> LayerResult:
    """Choose the codes of every linear of a layer, and leave the quantized weights in its module.

    Args:
        layer: the module with its original weights, float32.
        inputs: the hidden states; None for rounding to nearest, which needs none.

    Raises:
        QuantizationError: for inputs or weights that are not finite, and for a method that needs inputs without them.
    """
    return quantize_with(layer, inputs, settings, RECIPES[settings.method])


@torch.no_grad()
def quantize_with(layer: LayerView, inputs: LayerInputs | None, settings: QuantSettings, recipe: Recipe) -> LayerResult:
    """The same with steps of one's own."""
    if recipe.calibrated and (inputs is None or not len(inputs)):
        raise QuantizationError(f"{layer.name}: method '{settings.method}' needs calibration texts, and there are none")
    plain: dict[str, float] = {}
    tensors = _smooth(layer, inputs, settings, recipe, plain) if recipe.smooth and inputs is not None else {}
    original = copy.deepcopy(layer.module) if recipe.correction else None
    weights: dict[str, PackedWeight] = {}
    report: list[LinearReport] = []
    for group in layer.groups:
        problem = None
        if recipe.calibrated and inputs is not None:
            [moments] = collect(layer, (group,), inputs, original, recipe.weigh)
            problem = make_problem(moments, settings, recipe)
        for name in group.names:
            linear = layer.linear(name)
            weights[name], line = quantize_linear(f"{layer.name}.{name}", linear, problem, settings, recipe)
            linear.weight.data = dequantize(weights[name]).t().contiguous()
            if linear.bias is not None:
                linear.bias.data = linear.bias.to(settings.dense_dtype).float()
            report.append(replace(line, rtn_error=plain.get(name, line.rtn_error)))
    return LayerResult(weights, tensors, report)


def _smooth(
    layer: LayerView, inputs: LayerInputs, settings: QuantSettings, recipe: Recipe, plain: dict[str, float]
) -> dict[str, torch.Tensor]:
    """Fold AWQ's factors wherever a group has a producer; returns the dense tensors that changed.

    All inputs are collected first: a factor may change a weight that is quantized before its group is reached.

    Args:
        plain: is given the error of rounding each linear as it was.
    """
    groups = tuple(group for group in layer.groups if group.producer is not None)
    if not groups:
        return {}
    quantized = {name for group in layer.groups for name in group.names}
    changed: dict[str, torch.Tensor] = {}
    found = collect(layer, groups, inputs, None, recipe.weigh)
    for group, moments in zip(groups, found, strict=True):
        plain |= rounding_errors(layer, group, moments, settings)
    for group, moments in zip(groups, found, strict=True):
        if moments.weight_sum > 0:
            changed |= fold(layer, group, search_factors(layer, group, moments, settings), settings)
    return {name: tensor for name, tensor in changed.items() if name.rpartition(".")[0] not in quantized}
