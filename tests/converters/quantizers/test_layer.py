"""Whole layers: what each method promises of its result, its module, its report and its errors."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from converters.quantizers import LinearGroup, Method, QuantizationError, QuantSettings, quantize_layer
from converters.quantizers.awq import fold, search_factors
from converters.quantizers.grid import Grid, find_grid
from converters.quantizers.hessian import _require_finite, collect
from converters.quantizers.layer import quantize_with
from converters.quantizers.recipe import RECIPES
from quant_kernels.reference import dequantize
from tests.converters.quantizers.tiny_layer import Inputs, make_layer

CALIBRATED = (Method.AWQ, Method.GPTQ, Method.AUTO)
LINEARS = ("attention.q", "attention.k", "attention.v", "attention.o", "gate", "up", "down")


def settings(method: Method, **changes: object) -> QuantSettings:
    return replace(QuantSettings(method, group_size=32), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", CALIBRATED)
@pytest.mark.parametrize("sym", [False, True])
def test_every_method_beats_rounding_on_inputs_it_has_not_seen(method: Method, sym: bool) -> None:
    rounded, layer = make_layer(), make_layer()
    unseen = Inputs(layer, seed=2)
    quantize_layer(rounded, None, settings(Method.RTN, sym=sym))
    quantize_layer(layer, Inputs(layer), settings(method, sym=sym))
    assert unseen.error(layer.module) < 0.9 * unseen.error(rounded.module)


@pytest.mark.parametrize("method", list(Method))
@pytest.mark.parametrize("act_order", [False, True])
def test_the_module_holds_what_the_result_says(method: Method, act_order: bool) -> None:
    layer = make_layer(bias=True)
    result = quantize_layer(layer, Inputs(layer), settings(method, act_order=act_order))
    assert set(result.weights) == set(LINEARS)
    assert [line.name for line in result.report] == [f"model.layers.3.{name}" for name in LINEARS]
    for name, record in result.weights.items():
        linear = layer.linear(name)
        assert torch.equal(dequantize(record).t(), linear.weight)
        assert (record.perm is not None) == (act_order and method in (Method.GPTQ, Method.AUTO))
        if linear.bias is not None:
            assert record.bias is not None
            assert torch.equal(record.bias.float(), linear.bias)
    for name, tensor in result.tensors.items():
        assert tensor.dtype == torch.float16
        assert torch.equal(tensor.float(), layer.module.get_parameter(name))
    untouched = make_layer(bias=True).module
    for name, parameter in layer.module.named_parameters():
        if name not in result.tensors and name.rpartition(".")[0] not in LINEARS:
            assert torch.equal(parameter, untouched.get_parameter(name))


@pytest.mark.parametrize("method", list(Method))
def test_the_same_inputs_give_the_same_bits(method: Method) -> None:
    first, second = make_layer(), make_layer()
    one = quantize_layer(first, Inputs(first), settings(method))
    two = quantize_layer(second, Inputs(second), settings(method))
    for name, record in one.weights.items():
        assert torch.equal(record.codes, two.weights[name].codes)
        assert torch.equal(record.scales, two.weights[name].scales)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("bias", [False, True])
def test_awq_factors_leave_the_unquantized_layer_as_it_was(offset: float, bias: bool) -> None:
    layer = make_layer(bias=bias, offset=offset)
    inputs = Inputs(layer)
    before = copy.deepcopy(layer.module)
    wanted = settings(Method.AWQ)
    for group in layer.groups:
        width = layer.linear(group.names[0]).in_features
        size = width if group.producer_channels is None else int(group.producer_channels.max()) + 1
        factors = torch.logspace(-1, 1, size)[torch.randperm(size)]
        fold(layer, group, factors if group.producer_channels is None else factors[group.producer_channels], wanted)
        assert not torch.equal(layer.linear(group.names[0]).weight, before.get_submodule(group.names[0]).weight)
    for index in range(len(inputs)):
        expected = before(inputs.hidden(index))
        torch.testing.assert_close(
            layer.module(inputs.hidden(index)), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())
        )


def test_awq_factors_are_the_best_of_the_papers_grid() -> None:
    layer = make_layer()
    group = LinearGroup(("gate", "up"), "mlp_norm")
    inputs = Inputs(layer)
    [moments] = collect(layer, (group,), inputs)
    wanted = settings(Method.AWQ)
    found = search_factors(layer, group, moments, wanted)
    x = torch.cat([layer.module.mlp_norm(h + layer.module.attention(layer.module.norm(h)))[0] for h in inputs.states])

    def output_error(factors: torch.Tensor) -> float:
        total = 0.0
        for name in group.names:
            weight = layer.linear(name).weight
            groups = (weight * factors).unflatten(1, (-1, 32))
            low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
            scale = ((high.clamp(min=0) - low.clamp(max=0)) / 15).half().float()
            zero = (-low.clamp(max=0) / scale).round()
            rounded = (((groups / scale).round() + zero).clamp(0, 15) - zero) * scale
            total += float((x @ (rounded.flatten(1) / factors - weight).t()).square().sum())
        return total

    magnitude = x.abs().mean(0)
    grid = [magnitude.pow(step / 20) for step in range(21)]
    best = min(output_error(f / (f.max() * f.min()).sqrt()) for f in grid)
    assert output_error(found) <= best * 1.01
    assert output_error(found) < 0.9 * output_error(torch.ones_like(found))


def test_moments_follow_the_factors() -> None:
    """What is known of a layer's inputs before they are divided says all that a second pass would find."""
    layer = make_layer()
    inputs = Inputs(layer)
    known = collect(layer, layer.groups, inputs, weigh=True)
    torch.manual_seed(0)
    for group, moments in zip(layer.groups, known, strict=True):
        width = layer.linear(group.names[0]).in_features
        size = width if group.producer_channels is None else int(group.producer_channels.max()) + 1
        factors = torch.rand(size) + 0.5
        channels = group.producer_channels
        used, _ = fold(layer, group, factors if channels is None else factors[channels], settings(Method.AWQ))
        moments.divide_(used)
    for before, after in zip(known, collect(layer, layer.groups, inputs, weigh=True), strict=True):
        scale = float(after.hessian.abs().max())
        torch.testing.assert_close(before.hessian, after.hessian, rtol=1e-3, atol=1e-5 * scale)
        torch.testing.assert_close(before.mean_abs, after.mean_abs, rtol=1e-3, atol=1e-4)


def test_a_group_without_a_producer_is_not_scaled() -> None:
    layer = make_layer()
    alone = replace(layer, groups=tuple(LinearGroup(group.names) for group in layer.groups))
    result = quantize_layer(alone, Inputs(layer), settings(Method.AWQ))
    assert not result.tensors
    assert torch.equal(layer.module.norm.weight, make_layer().module.norm.weight)


def test_a_dense_producer_is_reported() -> None:
    layer = make_layer()
    skipped = replace(layer, groups=tuple(group for group in layer.groups if "up" not in group.names))
    result = quantize_layer(skipped, Inputs(layer), settings(Method.AWQ))
    assert "up.weight" in result.tensors
    torch.testing.assert_close(result.tensors["up.weight"].float(), layer.module.up.weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", CALIBRATED)
def test_inputs_that_are_not_finite_name_layer_and_sample(method: Method) -> None:
    layer = make_layer()
    inputs = Inputs(layer)
    inputs.states[4] = inputs.states[4].repeat(3, 1, 1)
    inputs.states[4][2, 3, 5] = torch.nan
    with pytest.raises(QuantizationError, match=r"model\.layers\.3: calibration sample 402 .*not finite"):
        quantize_layer(layer, inputs, settings(method))


def test_what_overflows_inside_a_layer_names_the_sample_too() -> None:
    """The second of two samples in batch 3; and where rows are not those of the batch, none that may be wrong."""
    layer = make_layer()
    inputs = Inputs(layer)
    inputs.states = [state.repeat(2, 1, 1) for state in inputs.states]

    class Overflows(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.norm(x)
            return torch.where(x.amax(dim=(1, 2), keepdim=True) >= 1e5, torch.inf, found)

    inputs.states[3][1, 2, 3] = 1e6
    layer.module.mlp_norm = Overflows(layer.module.mlp_norm)
    with pytest.raises(QuantizationError, match=r"layers\.3\.gate: calibration sample 301 gives"):
        quantize_layer(layer, inputs, settings(Method.GPTQ))
    with pytest.raises(QuantizationError, match=r"^gate: a calibration sample gives"):
        _require_finite(torch.full((7, 4), torch.nan), "gate", inputs, 0, 2)


def test_rounding_is_reported_of_the_original_weight() -> None:
    """Factors change a weight, and so what rounding would make of it; the comparison is with the model as it came."""
    layer, recipe = make_layer(), RECIPES[Method.AWQ]
    group = layer.groups[0]
    [moments] = collect(layer, (group,), Inputs(layer), recipe.weigh)
    result = quantize_layer(make_layer(), Inputs(layer), settings(Method.AWQ))
    found = {line.name.removeprefix("model.layers.3."): line.rtn_error for line in result.report}
    for name in group.names:
        weight = layer.linear(name).weight.data
        grid = find_grid(weight, settings(Method.AWQ))
        groups = weight.unflatten(1, (grid.scales.shape[1], -1))
        plain = Grid(grid.scales.unsqueeze(2), grid.zeros.unsqueeze(2), grid.max_code).nearest(groups).flatten(1)
        error = plain - weight
        expected = ((error @ moments.hessian) * error).sum() / ((weight @ moments.hessian) * weight).sum()
        assert found[name] == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("method", list(Method))
def test_weights_that_are_not_finite_name_the_linear(method: Method) -> None:
    layer = make_layer()
    layer.linear("attention.k").weight.data[0, 0] = torch.inf
    inputs = Inputs(make_layer())
    with pytest.raises(QuantizationError, match=r"model\.layers\.3\.(attention\.k: the weight|attention\.o: calib)"):
        quantize_layer(layer, inputs, settings(method))


def test_calibration_is_asked_for() -> None:
    with pytest.raises(QuantizationError, match="needs calibration texts"):
        quantize_layer(make_layer(), None, settings(Method.AWQ))


@pytest.mark.parametrize("method", CALIBRATED)
def test_inputs_that_are_always_zero_fall_back_with_a_note(method: Method) -> None:
    layer = make_layer()
    inputs = Inputs(layer)
    inputs.states = [torch.zeros_like(x) for x in inputs.states]
    result = quantize_layer(layer, inputs, settings(method))
    assert all("rounded to nearest" in line.notes[0] for line in result.report)


@pytest.mark.parametrize("method", [Method.GPTQ, Method.AUTO])
@pytest.mark.parametrize("shrinkage", [0.0, RECIPES[Method.AUTO].shrinkage])
def test_fewer_positions_than_inputs_still_give_a_finite_layer(method: Method, shrinkage: float) -> None:
    """A Hessian without full rank needs damping, unless shrinkage has filled it up."""
    layer = make_layer()
    inputs = Inputs(layer, batches=1, length=3)
    recipe = replace(RECIPES[method], shrinkage=shrinkage)
    result = quantize_with(layer, inputs, settings(method, damping=1e-9), recipe)
    assert any("damping raised" in note for line in result.report for note in line.notes) == (shrinkage == 0)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in layer.module.parameters())


def test_odd_sizes_are_refused_with_the_way_out() -> None:
    layer = make_layer()
    layer.module.down = torch.nn.Linear(97, 64)
    with pytest.raises(QuantizationError, match=r"down: 97 inputs; expected a multiple of 8.*--skip"):
        quantize_layer(layer, None, settings(Method.RTN))


@pytest.mark.parametrize("bad", [{"bits": 3}, {"group_size": 0}, {"damping": 0.0}, {"min_zero": 15}])
def test_settings_that_mean_nothing_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(bad)))):
        settings(Method.RTN, **bad)
