"""Rounding, GPTQ and coordinate descent against brute-force references, and the properties that they promise."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from converters.quantizers import Method, QuantSettings
from converters.quantizers.descent import descend
from converters.quantizers.gptq import condition_, factorize, gptq_codes
from converters.quantizers.grid import Grid, find_grid, group_index, nearest_values, pack, search_grid
from converters.quantizers.linear import relative_errors
from quant_kernels.packing import unpack_codes
from quant_kernels.reference import dequantize

SETTINGS = QuantSettings(Method.GPTQ, group_size=32)
SYM = QuantSettings(Method.GPTQ, group_size=32, sym=True)


def problem(rows: int = 24, columns: int = 192, samples: int = 400, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [N, K] and the Hessian [K, K] of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -1.5, columns).unsqueeze(1)
    x = torch.randn(samples, columns, generator=generator) @ mix
    return torch.randn(rows, columns, generator=generator), x.t() @ x / samples


def loss(weight: torch.Tensor, hessian: torch.Tensor, codes: torch.Tensor, grid: Grid) -> float:
    index = torch.arange(weight.shape[1]) // SETTINGS.group_size
    return relative_errors(weight, [grid.per_weight(index).values(codes)], hessian)[0]


def brute_round(row: np.ndarray, sym: bool, min_zero: int) -> tuple[np.ndarray, float, int]:
    """One group, one number at a time, in float64 but for the scale's rounding."""
    low, high = min(row.min(), 0.0), max(row.max(), 0.0)
    if sym:
        scale, zero = np.float16(max(-low, high) * 2 / 15), 8
    else:
        scale = np.float16((high - low) / 15)
        zero = round(-low / float(scale))
        if zero < min_zero:
            # What the raised zero point takes from the positive side must not cut off the largest value.
            scale, zero = max(scale, np.float16(high / (15 - min_zero))), min_zero
    codes = [min(max(round(float(v) / float(scale)) + zero, 0), 15) for v in row]
    return np.array(codes), float(scale), zero


@pytest.mark.parametrize(("sym", "min_zero"), [(False, 0), (False, 1), (True, 0)])
def test_rounding_is_what_a_loop_over_numbers_does(sym: bool, min_zero: int) -> None:
    settings = QuantSettings(Method.RTN, group_size=32, sym=sym, min_zero=min_zero)
    weight, _ = problem()
    weight[0] = weight[0].abs() + 1.0
    weight[1] = -weight[1].abs() - 1.0
    grid = find_grid(weight, settings)
    codes = grid.per_weight(group_index(weight.shape[1], settings, weight.device)).codes(weight)
    for n in range(weight.shape[0]):
        for group in range(grid.scales.shape[1]):
            part = slice(group * 32, group * 32 + 32)
            expected, scale, zero = brute_round(weight[n, part].numpy(), sym, min_zero)
            assert float(grid.scales[n, group]) == scale
            assert int(grid.zeros[n, group]) == zero
            assert np.abs(codes[n, part].numpy() - expected).max() <= 0


def test_zero_points_for_files_that_store_them_less_one_are_at_least_one() -> None:
    weight, hessian = problem()
    weight[::2] = weight[::2].abs()  # whose best zero point is 0
    settings = QuantSettings(Method.GPTQ, group_size=32, min_zero=1)
    for grid in (find_grid(weight, settings), search_grid(weight, hessian.diagonal(), settings)):
        assert int(grid.zeros.min()) == 1
        assert int(find_grid(weight, SETTINGS).zeros.min()) == 0


def test_scales_are_the_files_before_codes_are_chosen() -> None:
    weight, _ = problem()
    for dtype in (torch.float16, torch.bfloat16):
        settings = QuantSettings(Method.RTN, group_size=32, scale_dtype=dtype)
        grid = find_grid(weight * 1.2345, settings)
        assert torch.equal(grid.scales, grid.scales.to(dtype).float())


def test_a_group_of_zeros_and_one_of_huge_values_stay_finite() -> None:
    weight, _ = problem()
    weight[:, :32] = 0.0
    weight[:, 32:64] *= 1e6
    grid = find_grid(weight, SETTINGS)
    values = grid.per_weight(group_index(192, SETTINGS, weight.device)).nearest(weight)
    assert bool(torch.isfinite(values).all())
    assert not bool(values[:, :32].any())
    assert bool((grid.scales > 0).all())


@pytest.mark.parametrize("settings", [SETTINGS, SYM])
@pytest.mark.parametrize("num_inputs", [192, 176])
def test_rounding_by_groups_is_rounding_by_weights(settings: QuantSettings, num_inputs: int) -> None:
    """Bit for bit, with a last short group as well."""
    weight = problem()[0][:, :num_inputs]
    before = weight.clone()
    index = group_index(num_inputs, settings, weight.device)
    assert torch.equal(nearest_values(weight, settings), find_grid(weight, settings).per_weight(index).nearest(weight))
    assert torch.equal(weight, before)


def test_a_record_holds_what_was_chosen() -> None:
    weight, _ = problem()
    for settings in (SETTINGS, SYM):
        grid = find_grid(weight, settings)
        index = group_index(192, settings, weight.device)
        codes = grid.per_weight(index).codes(weight)
        perm = torch.randperm(192)
        record = pack(codes, grid, settings, method="rtn", perm=perm)
        assert torch.equal(unpack_codes(record.codes, 4).t().float(), codes)
        assert torch.equal(dequantize(record)[perm].t(), grid.per_weight(index).values(codes))


def test_a_last_short_group() -> None:
    weight, _ = problem(columns=80)
    grid = find_grid(weight, SETTINGS)
    assert grid.scales.shape == (24, 3)
    alone = find_grid(weight[:, 64:], SETTINGS)
    assert torch.equal(grid.scales[:, 2:], alone.scales)


def test_a_searched_range_is_no_worse_than_the_full_one() -> None:
    weight, hessian = problem()
    index = group_index(192, SETTINGS, weight.device)
    blocks = torch.stack([hessian[i : i + 32, i : i + 32] for i in range(0, 192, 32)])
    for importance in (hessian.diagonal(), blocks):
        block_diagonal = torch.diag(importance) if importance.dim() == 1 else torch.block_diag(*importance)
        full, found = find_grid(weight, SETTINGS), search_grid(weight, importance, SETTINGS)
        errors = [g.per_weight(index).nearest(weight) - weight for g in (full, found)]
        before, after = (((e @ block_diagonal) * e).sum(dim=1) for e in errors)
        assert bool((after <= before * 1.0001).all())
        assert float(after.sum()) < 0.95 * float(before.sum())


def brute_gptq(
    weight: np.ndarray, hessian: np.ndarray, scales: np.ndarray, zeros: np.ndarray, damping: float
) -> np.ndarray:
    """The definition: after each column the rest takes the least-squares compensation, from a fresh inverse."""
    hessian = hessian + damping * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    left = weight.copy()
    codes = np.zeros_like(weight)
    todo = list(np.argsort(-np.diag(hessian), kind="stable"))
    while todo:
        i = todo[0]
        inverse = np.linalg.inv(hessian[np.ix_(todo, todo)])
        scale, zero = scales[:, i // 32], zeros[:, i // 32]
        codes[:, i] = np.clip(np.round(left[:, i] / scale) + zero, 0, 15)
        error = left[:, i] - (codes[:, i] - zero) * scale
        left[:, todo] -= np.outer(error / inverse[0, 0], inverse[0])
        todo = todo[1:]
    return codes


def test_gptq_is_column_by_column_compensation() -> None:
    weight, hessian = problem(rows=12)
    grid = find_grid(weight, SETTINGS)
    factor = factorize(hessian, 0.05)
    assert factor is not None
    codes = gptq_codes(weight, factor, grid, group_index(192, SETTINGS, weight.device))
    exact = [t.double().numpy() for t in (weight, hessian, grid.scales, grid.zeros)]
    expected = brute_gptq(*exact, damping=0.05)
    # A number that lies between two codes may round either way in float32, and moves its row's later ones.
    assert np.mean(codes.numpy() != expected) < 0.02
    again = loss(weight, hessian, torch.from_numpy(expected).float(), grid)
    assert loss(weight, hessian, codes, grid) == pytest.approx(again, rel=0.02)


@pytest.mark.parametrize("settings", [SETTINGS, SYM])
@pytest.mark.parametrize("seed", range(3))
def test_each_step_beats_the_one_before_on_correlated_inputs(settings: QuantSettings, seed: int) -> None:
    weight, hessian = problem(seed=seed)
    index = group_index(192, settings, weight.device)
    grid = find_grid(weight, settings)
    factor = factorize(hessian, 0.01)
    assert factor is not None
    rounded = loss(weight, hessian, grid.per_weight(index).codes(weight), grid)
    codes = gptq_codes(weight, factor, grid, index)
    fed_back = loss(weight, hessian, codes, grid)
    descended = loss(weight, hessian, *descend(weight, hessian, codes, grid, settings, 3))
    assert fed_back < 0.5 * rounded
    assert descended < 0.95 * fed_back


def test_descent_never_goes_up_and_ends_where_no_single_code_helps() -> None:
    weight, hessian = problem(rows=6, columns=64)
    grid = find_grid(weight, SETTINGS)
    codes = grid.per_weight(group_index(64, SETTINGS, weight.device)).codes(weight)
    losses = [loss(weight, hessian, codes, grid)]
    for _ in range(30):
        codes, grid = descend(weight, hessian, codes, grid, SETTINGS, 1, refit=False)
        losses.append(loss(weight, hessian, codes, grid))
    assert all(b <= a * 1.00001 for a, b in pairwise(losses))
    for n in range(6):
        for k in range(64):
            for other in (codes[n, k] - 1, codes[n, k] + 1):
                changed = codes.clone()
                changed[n, k] = other.clamp(0, 15)
                assert loss(weight, hessian, changed, grid) >= losses[-1] * 0.99999


def test_refit_scales_are_best_for_their_codes() -> None:
    weight, hessian = problem(rows=6, columns=32)
    grid = find_grid(weight, SETTINGS)
    codes, found = descend(weight, hessian, grid.codes(weight), grid, SETTINGS, 20)
    base = loss(weight, hessian, codes, found)
    for factor in (0.99, 1.01):
        assert loss(weight, hessian, codes, Grid(found.scales * factor, found.zeros, 15)) > base


def test_dead_columns_do_not_disturb_the_others() -> None:
    weight, hessian = problem()
    dead = torch.tensor([0, 7, 100])
    hessian[dead] = 0
    hessian[:, dead] = 0
    factor = factorize(condition_(hessian), 0.01)
    assert factor is not None
    codes = gptq_codes(weight, factor, find_grid(weight, SETTINGS), group_index(192, SETTINGS, weight.device))
    nearest = find_grid(weight, SETTINGS).per_weight(group_index(192, SETTINGS, weight.device)).codes(weight)
    assert torch.equal(codes[:, dead], nearest[:, dead])


def test_a_rank_deficient_hessian_is_damped_and_an_impossible_one_given_up() -> None:
    _, hessian = problem(samples=5)
    factor = factorize(hessian, 1e-12)
    assert factor is not None
    assert factor.damping > 1e-12
    assert factorize(torch.full_like(hessian, torch.nan), 0.01) is None
    assert factorize(-hessian - torch.eye(192), 0.01) is None


def test_small_weights_have_small_scales() -> None:
    """Of 8 bits and a deviation of 1e-3 the scales lie below float16's smallest normal number."""
    settings = QuantSettings(Method.RTN, bits=8, group_size=32)
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(3)) * 1e-3
    grid = find_grid(weight, settings)
    values = grid.per_weight(group_index(64, settings, weight.device)).nearest(weight)
    spread = weight.unflatten(1, (2, 32))
    steps = ((spread.amax(-1) - spread.amin(-1)) / 255).repeat_interleave(32, dim=1)
    # Half a step, and what a scale of few bits adds at the ends of the range.
    assert ((values - weight).abs() <= 1.5 * steps).all()
    assert (find_grid(torch.zeros(1, 32), settings).scales > 0).all()
