"""Quantize one decoder layer: AWQ's factors, then the codes of each group of linears, in the order in which they run.

A group's inputs are taken from the layer as quantized so far. Invariant: when a layer is done its module holds exactly
what the records and tensors of the result say, so that running it gives the next layer's inputs.
"""

from __future__ import annotations

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
from converters.quantizers.hessian import Moments, collect
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
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, float] = {}
    known: list[Moments | None] = [None] * len(layer.groups)
    if inputs is not None and recipe.calibrated and (recipe.smooth or not recipe.sequential):
        known = [*collect(layer, layer.groups, inputs, recipe.weigh)]
    if recipe.smooth:
        for group, moments in zip(layer.groups, known, strict=True):
            plain |= {} if moments is None else rounding_errors(layer, group, moments, settings)
        tensors = _smooth(layer, known, settings)
    weights: dict[str, PackedWeight] = {}
    report: list[LinearReport] = []
    if recipe.sequential:
        # What a group is fed changes with the groups before it, of which the first has none.
        known[1:] = [None] * (len(layer.groups) - 1)
    for place, group in enumerate(layer.groups):
        problem = None
        if recipe.calibrated and inputs is not None:
            found, known[place] = known[place], None
            [moments] = collect(layer, (group,), inputs, recipe.weigh) if found is None else [found]
            problem = make_problem(moments, settings, recipe)
            del found, moments
        for name in group.names:
            linear = layer.linear(name)
            weights[name], line = quantize_linear(f"{layer.name}.{name}", linear, problem, settings, recipe)
            linear.weight.data = dequantize(weights[name]).t().contiguous()
            if linear.bias is not None:
                linear.bias.data = linear.bias.to(settings.dense_dtype).float()
            report.append(replace(line, rtn_error=plain.get(name, line.rtn_error)))
    return LayerResult(weights, tensors, report)


def _smooth(layer: LayerView, known: list[Moments | None], settings: QuantSettings) -> dict[str, torch.Tensor]:
    """Fold AWQ's factors wherever a group has a producer, and make its moments those of the divided inputs.

    Returns:
        The dense tensors that changed.
    """
    quantized = {name for group in layer.groups for name in group.names}
    changed: dict[str, torch.Tensor] = {}
    for group, moments in zip(layer.groups, known, strict=True):
        if group.producer is not None and moments is not None and moments.weight_sum > 0:
            factors, tensors = fold(layer, group, search_factors(layer, group, moments, settings), settings)
            moments.divide_(factors)
            changed |= tensors
    return {name: tensor for name, tensor in changed.items() if name.rpartition(".")[0] not in quantized}
