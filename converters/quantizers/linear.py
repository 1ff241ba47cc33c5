"""The codes of one linear, from its weight and the moments of its inputs.

Invariant: the record is exact and the result does not depend on the thread that asks; what had to be done differently
(more damping, rounding instead) is a note, never silent. It does not run the layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from converters.quantizers.base import (
    LayerView,
    LinearGroup,
    LinearReport,
    Method,
    QuantizationError,
    QuantSettings,
)
from converters.quantizers.descent import descend
from converters.quantizers.gptq import Factor, condition_, factorize, gptq_codes
from converters.quantizers.grid import Grid, find_grid, group_index, nearest_values, pack, search_grid
from converters.quantizers.hessian import Moments
from converters.quantizers.recipe import Recipe, Search
from quant_kernels.packed_weight import CODES_PER_WORD, PackedWeight


@dataclass(frozen=True, slots=True)
class Problem:
    """What the linears of one group share; matrices are float32 [K, K] in the order of `perm`.

    Attributes:
        hessian: per position, dead columns counted as one, damped.
        ridge: what shrinkage and damping added to its diagonal, [K]; None for nothing.
        factor: of `hessian` for GPTQ, or None if it is not asked for or could not be had.
        perm: int64 [K]: the input at each place, by importance, if the groups are to follow it.
        notes: what the user should know.
    """

    hessian: torch.Tensor
    ridge: torch.Tensor | None = None
    factor: Factor | None = None
    perm: torch.Tensor | None = None
    notes: tuple[str, ...] = ()


def make_problem(moments: Moments, settings: QuantSettings, recipe: Recipe) -> Problem | None:
    """The problem of a group; None where calibration says nothing about its inputs. Uses the moments up."""
    if moments.weight_sum <= 0 or not bool(moments.hessian.any()):
        return None
    hessian = condition_(moments.hessian.div_(moments.weight_sum))
    if not recipe.feedback:
        return Problem(hessian)
    perm = None
    if settings.act_order:
        perm = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        hessian = hessian[perm.unsqueeze(1), perm]
    ridge = recipe.shrinkage * hessian.diagonal()
    hessian.diagonal().add_(ridge)
    factor = factorize(hessian, settings.damping)
    if factor is None:
        note = "the Hessian cannot be factorized with any damping: rounded to nearest"
        return Problem(hessian, ridge, perm=perm, notes=(note,))
    raised = factor.damping > settings.damping
    notes = (f"damping raised from {settings.damping:g} to {factor.damping:g}",) if raised else ()
    added = factor.damping * hessian.diagonal().mean()
    hessian.diagonal().add_(added)
    return Problem(hessian, ridge + added, factor, perm, notes)


def quantize_linear(
    name: str, linear: nn.Linear, problem: Problem | None, settings: QuantSettings, recipe: Recipe
) -> tuple[PackedWeight, LinearReport]:
    """The record of a linear, and its line of the report. `name` is the full one.

    Raises:
        QuantizationError: if the weight is not finite, or its inputs do not fill whole words.
    """
    _check(name, linear, settings)
    weight = linear.weight.data.float()
    if problem is None:
        notes = ("calibration never reached it: rounded to nearest",) if recipe.calibrated else ()
        record = _round(weight, linear.bias, settings)
        return record, LinearReport(name, Method.RTN.value, math.nan, math.nan, notes)
    perm = problem.perm
    ordered = weight if perm is None else weight[:, perm]
    method = settings.method
    if recipe.feedback and problem.factor is None:
        recipe, method = replace(recipe, search=Search.FULL, passes=0), Method.RTN
    codes, grid = _choose(ordered, problem, settings, recipe)
    record = pack(codes, grid, settings, method=method.value, bias=linear.bias, perm=perm)
    index = group_index(weight.shape[1], settings, weight.device)
    plain = nearest_values(weight, settings)
    plain = plain if perm is None else plain[:, perm]
    found = grid.per_weight(index).values(codes)
    error, rtn_error = relative_errors(ordered, (found, plain), problem.hessian, problem.ridge)
    return record, LinearReport(name, method.value, error, rtn_error, problem.notes)


def rounding_errors(
    layer: LayerView, group: LinearGroup, moments: Moments, settings: QuantSettings
) -> dict[str, float]:
    """What plain rounding to nearest would make of each linear of a group, by `relative_errors`."""
    errors = {}
    for name in group.names:
        weight = layer.linear(name).weight.data.float()
        [errors[name]] = relative_errors(weight, (nearest_values(weight, settings),), moments.hessian)
    return errors


def _choose(
    weight: torch.Tensor, problem: Problem, settings: QuantSettings, recipe: Recipe
) -> tuple[torch.Tensor, Grid]:
    index = group_index(weight.shape[1], settings, weight.device)
    grid = _ranges(weight, problem.hessian, settings, recipe.search)
    if problem.factor is not None:
        codes = gptq_codes(weight, problem.factor, grid, index)
    else:
        codes = grid.per_weight(index).codes(weight)
    if recipe.passes:
        codes, grid = descend(weight, problem.hessian, codes, grid, settings, recipe.passes)
    return codes, grid


def _ranges(weight: torch.Tensor, hessian: torch.Tensor, settings: QuantSettings, search: Search) -> Grid:
    rows = settings.rows_per_group(weight.shape[1])
    if search is Search.FULL:
        return find_grid(weight, settings)
    if search is Search.INPUTS or weight.shape[1] % rows:
        return search_grid(weight, hessian.diagonal(), settings)
    spans = [slice(start, start + rows) for start in range(0, weight.shape[1], rows)]
    return search_grid(weight, torch.stack([hessian[span, span] for span in spans]), settings)


def _round(weight: torch.Tensor, bias: torch.Tensor | None, settings: QuantSettings) -> PackedWeight:
    grid = find_grid(weight, settings)
    codes = grid.per_weight(group_index(weight.shape[1], settings, weight.device)).codes(weight)
    return pack(codes, grid, settings, method=Method.RTN.value, bias=bias)


def relative_errors(
    weight: torch.Tensor, found: Sequence[torch.Tensor], hessian: torch.Tensor, ridge: torch.Tensor | None = None
) -> list[float]:
    """Mean square of the outputs' error over that of the outputs, of each weight that was found for `weight`.

    Args:
        ridge: what was added to the Hessian's diagonal.
    """
    power = _power(weight, hessian, ridge)
    errors = [_power(one - weight, hessian, ridge) for one in found]
    return [max(error, 0.0) / power if power > 0 else math.nan for error in errors]


def _power(weight: torch.Tensor, hessian: torch.Tensor, ridge: torch.Tensor | None) -> float:
    total = float((weight @ hessian).mul_(weight).sum())
    return total if ridge is None else total - float((weight.square() @ ridge).sum())


def _check(name: str, linear: nn.Linear, settings: QuantSettings) -> None:
    if not bool(torch.isfinite(linear.weight).all()):
        raise QuantizationError(
            f"{name}: the weight holds values that are not finite (NaN or infinity); expected finite ones; "
            "check the checkpoint, or leave the linear as it is with --skip"
        )
    per_word = CODES_PER_WORD[settings.bits]
    if linear.in_features % per_word:
        raise QuantizationError(
            f"{name}: {linear.in_features} inputs; expected a multiple of {per_word}, because {per_word} codes share a "
            "word; leave the linear as it is with --skip"
        )
