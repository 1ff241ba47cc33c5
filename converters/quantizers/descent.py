"""Coordinate descent on the output error ``trace(E H E^T)``: codes one column at a time, scales in closed form.

GPTQ decides each column once, knowing only those before it. Here each column is decided again, knowing all others, and
after the columns of a group its scale is the best for its codes. Invariant: up to the rounding of a scale to the file's
dtype no step makes the error larger; a group whose new scale did is put back.
"""

from __future__ import annotations

import torch

from converters.quantizers.base import QuantSettings
from converters.quantizers.grid import Grid, round_scales


def descend(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    codes: torch.Tensor,
    grid: Grid,
    settings: QuantSettings,
    passes: int,
    refit: bool = True,
) -> tuple[torch.Tensor, Grid]:
    """Better codes [N, K] and scales [N, G] for a target weight [N, K] and a damped Hessian [K, K].

    Groups are runs of neighbouring columns. Nothing is changed in place.
    """
    rows = settings.rows_per_group(weight.shape[1])
    codes, scales, zeros = codes.clone(), grid.scales.clone(), grid.zeros
    for _ in range(passes):
        gradient = (weight - _values(codes, scales, zeros, rows)) @ hessian
        for group in range(scales.shape[1]):
            part = slice(group * rows, min((group + 1) * rows, weight.shape[1]))
            local = Grid(scales[:, group], zeros[:, group], grid.max_code)
            inner = hessian[part, part]
            before = local.values(codes[:, part].t()).t()
            new = _columns(before, codes[:, part], gradient[:, part], inner, local)
            if refit:
                # Of the gradient after the columns' moves.
                moved = gradient[:, part] - (local.values(new.t()).t() - before) @ inner
                scales[:, group] = _refit(new, local, moved, inner, settings)
            codes[:, part] = new
            after = Grid(scales[:, group], zeros[:, group], grid.max_code).values(new.t()).t()
            gradient -= (after - before) @ hessian[part]
    return codes, Grid(scales, zeros, grid.max_code)


def _columns(
    values: torch.Tensor, codes: torch.Tensor, gradient: torch.Tensor, hessian: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """One sweep over a group's columns; returns the new codes."""
    slope = gradient.t().contiguous()
    current = values.t().contiguous()
    new = codes.t().contiguous()
    for step in range(len(current)):
        code = grid.codes(current[step] + slope[step] / hessian[step, step])
        change = grid.values(code) - current[step]
        new[step] = code
        slope -= hessian[step].unsqueeze(1) * change
    return new.t()


def _refit(
    codes: torch.Tensor, grid: Grid, gradient: torch.Tensor, hessian: torch.Tensor, settings: QuantSettings
) -> torch.Tensor:
    """The scale of each row that is best for its codes; the old one where rounding or the sign would spoil it."""
    steps = (codes.t() - grid.zeros).t()
    curvature = ((steps @ hessian) * steps).sum(dim=1)
    slope = (gradient * steps).sum(dim=1)
    found = grid.scales + slope / curvature.clamp(min=torch.finfo(torch.float32).tiny)
    found = torch.where((curvature > 0) & (found > 0), found, grid.scales)
    found = round_scales(found, settings)
    change = found - grid.scales
    gain = 2 * change * slope - change.square() * curvature
    return torch.where(gain > 0, found, grid.scales)


def _values(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, rows: int) -> torch.Tensor:
    index = torch.arange(codes.shape[1], device=codes.device) // rows
    return (codes - zeros[:, index]) * scales[:, index]
