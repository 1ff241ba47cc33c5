"""One linear: what happens to Hessians that cannot be used, and what its errors mean."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from converters.quantizers import Method, QuantSettings
from converters.quantizers.grid import find_grid
from converters.quantizers.hessian import Moments
from converters.quantizers.linear import make_problem, quantize_linear
from converters.quantizers.recipe import RECIPES, Recipe
from quant_kernels.reference import dequantize

SETTINGS = QuantSettings(Method.GPTQ, group_size=32)
GPTQ = Recipe(feedback=True)


def moments(x: torch.Tensor) -> Moments:
    found = Moments.empty(x.shape[1], x.device)
    for part in range(0, len(x), 50):
        found.add(x[part : part + 50], None)
    return found


def test_a_zero_point_that_is_raised_does_not_clip() -> None:
    """GPTQ's first version has no zero point of 0: a group without negative weights takes its scale from 14 codes."""
    weight = torch.linspace(0, 1, 32).repeat(3, 1) * torch.tensor([[1.0], [7.0], [0.01]])
    grid = find_grid(weight, QuantSettings(Method.RTN, group_size=32, min_zero=1))
    assert (grid.zeros == 1).all()
    error = (grid.nearest(weight) - weight).abs().amax(dim=1, keepdim=True)
    assert (error <= 0.51 * grid.scales).all()


def samples(rows: int = 300) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(rows, 64) @ torch.randn(64, 64)


def linear() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(64, 16, bias=False).requires_grad_(False)


@pytest.mark.parametrize("spoil", ["nan", "negative"])
def test_a_hessian_that_cannot_be_factorized_is_reported_and_rounded(spoil: str) -> None:
    found = moments(samples())
    found.hessian[3, 3] = torch.nan if spoil == "nan" else -1e9
    problem = make_problem(found, SETTINGS, RECIPES[Method.AUTO])
    assert problem is not None
    record, line = quantize_linear("model.layers.0.down", linear(), problem, SETTINGS, RECIPES[Method.AUTO])
    assert line.method == "rtn"
    assert "rounded to nearest" in line.notes[0]
    step = float(record.scales.max())
    assert float((dequantize(record).t() - linear().weight).abs().max()) <= step


def test_a_rank_deficient_hessian_and_dead_columns_are_quantized() -> None:
    x = samples(5)
    x[:, [0, 9]] = 0
    problem = make_problem(moments(x), SETTINGS, GPTQ)
    assert problem is not None
    record, line = quantize_linear("down", linear(), problem, SETTINGS, GPTQ)
    assert line.method == "gptq"
    assert line.error < 0.5 * line.rtn_error
    assert bool(torch.isfinite(dequantize(record)).all())


def test_the_error_is_that_of_the_outputs() -> None:
    x = samples()
    problem = make_problem(moments(x), SETTINGS, GPTQ)
    assert problem is not None
    record, line = quantize_linear("down", linear(), problem, SETTINGS, GPTQ)
    wanted = linear()(x)
    error = float((x @ dequantize(record) - wanted).square().sum() / wanted.square().sum())
    assert line.error == pytest.approx(error, rel=0.02)


def test_act_order_groups_by_importance() -> None:
    x = samples()
    x[:, ::2] *= 10
    settings = QuantSettings(Method.GPTQ, group_size=32, act_order=True)
    problem = make_problem(moments(x), settings, GPTQ)
    assert problem is not None
    record, _ = quantize_linear("down", linear(), problem, settings, GPTQ)
    assert record.perm is not None
    assert set(record.perm[:32].tolist()) == set(range(0, 64, 2))
