"""Scales and zero points, and the codes that they make: rounding to nearest, with or without a search for the range.

A weight here is float32 [N, K], as a Linear holds it; tables are [N, G]. Invariant: a scale is the value that the file
will hold, rounded before any code was chosen, and a zero point is an integer from `min_zero` to `max_code`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from converters.quantizers.base import QuantSettings
from quant_kernels.packed_weight import PackedWeight
from quant_kernels.packing import pack_codes

#: Ranges that are tried: all of it, and so many steps down.
RANGE_STEPS = 16
RANGE_STEP = 0.025
#: float16 steps by 2**-24 below its smallest normal number: here by a sixteenth.
_LEAST_SCALE = 2.0**-20


@dataclass(frozen=True, slots=True)
class Grid:
    """Scales and zero points of groups of weights, float32 of one shape, any; the zero points are integers.

    Results have the shape that a weight and a table give together, and are made in place from the first of them on.
    """

    scales: torch.Tensor
    zeros: torch.Tensor
    max_code: int

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """The nearest codes, as floats; the tables broadcast against `weight`."""
        return (weight / self.scales).round_().add_(self.zeros).clamp_(0, self.max_code)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """What codes stand for."""
        return (codes - self.zeros).mul_(self.scales)

    def nearest(self, weight: torch.Tensor) -> torch.Tensor:
        """The nearest values."""
        return self.codes(weight).sub_(self.zeros).mul_(self.scales)

    def slice(self, part: slice) -> Grid:
        """A run of columns of the tables."""
        return Grid(self.scales[:, part], self.zeros[:, part], self.max_code)

    def column(self, index: int) -> Grid:
        """One column of the tables: [N]."""
        return Grid(self.scales[:, index], self.zeros[:, index], self.max_code)

    def per_weight(self, group_of: torch.Tensor) -> Grid:
        """Tables [N, K] for inputs that belong to the groups int64 [K]."""
        return Grid(self.scales[:, group_of], self.zeros[:, group_of], self.max_code)


def range_grid(low: torch.Tensor, high: torch.Tensor, settings: QuantSettings) -> Grid:
    """The grid that spans [low, high], both of any one shape; zero is always on it."""
    top = settings.max_code
    low, high = low.clamp(max=0), high.clamp(min=0)
    if settings.sym:
        half = torch.maximum(-low, high)
        scales = round_scales(half * (2 / top), settings)
        return Grid(scales, torch.full_like(scales, 2 ** (settings.bits - 1)), top)
    scales = round_scales((high - low) / top, settings)
    zeros = torch.round(-low / scales)
    # A zero point that has to be raised takes codes from the positive side.
    above = round_scales(high / (top - settings.min_zero), settings)
    scales = torch.where(zeros < settings.min_zero, torch.maximum(scales, above), scales)
    return Grid(scales, zeros.clamp_(settings.min_zero, top), top)


def round_scales(scales: torch.Tensor, settings: QuantSettings) -> torch.Tensor:
    """Scales as the file holds them; too small ones become one that float16 has a few bits for, so that none is 0."""
    return scales.clamp(_LEAST_SCALE, torch.finfo(settings.scale_dtype).max).to(settings.scale_dtype).float()


def grouped(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """[N, K] as [N, G, rows]; a last short group is filled by repeating the last input, which changes no range."""
    short = -weight.shape[1] % rows
    if short:
        weight = torch.cat([weight, weight[:, -1:].expand(-1, short)], dim=1)
    return weight.reshape(weight.shape[0], -1, rows)


def find_grid(weight: torch.Tensor, settings: QuantSettings) -> Grid:
    """The grid of each group of a weight, from its least to its largest value: tables [N, G]."""
    groups = grouped(weight, settings.rows_per_group(weight.shape[1]))
    return range_grid(groups.amin(dim=2), groups.amax(dim=2), settings)


def nearest_values(weight: torch.Tensor, settings: QuantSettings) -> torch.Tensor:
    """A weight [N, K] rounded to nearest on the grids of `find_grid`."""
    rows = settings.rows_per_group(weight.shape[1])
    groups = grouped(weight, rows)
    grid = range_grid(groups.amin(dim=2, keepdim=True), groups.amax(dim=2, keepdim=True), settings)
    return grid.nearest(groups).flatten(1)[:, : weight.shape[1]]


def search_grid(weight: torch.Tensor, importance: torch.Tensor, settings: QuantSettings) -> Grid:
    """The best of narrower ranges for each group, by the square error of rounding to nearest: tables [N, G].

    Args:
        importance: of each input, [K]; of each pair of inputs of a group, [G, rows, rows], which needs whole groups.
    """
    rows = settings.rows_per_group(weight.shape[1])
    groups = grouped(weight, rows)
    low, high = groups.amin(dim=2), groups.amax(dim=2)
    weights = grouped(importance.unsqueeze(0), rows) if importance.dim() == 1 else None
    best: Grid | None = None
    least = torch.full_like(low, torch.inf)
    for step in range(RANGE_STEPS):
        share = 1 - step * RANGE_STEP
        grid = range_grid(low * share, high * share, settings)
        error = Grid(grid.scales.unsqueeze(2), grid.zeros.unsqueeze(2), grid.max_code).nearest(groups) - groups
        if weights is not None:
            loss = (error.square() * weights).sum(dim=2)
        else:
            loss = (torch.einsum("ngi,gij->ngj", error, importance) * error).sum(dim=2)
        if best is None:
            best, least = grid, loss
            continue
        better = loss < least
        least = torch.where(better, loss, least)
        best = Grid(
            torch.where(better, grid.scales, best.scales), torch.where(better, grid.zeros, best.zeros), grid.max_code
        )
    assert best is not None, "at least one range is tried"
    return best


def group_index(in_features: int, settings: QuantSettings, device: torch.device) -> torch.Tensor:
    """int64 [K]: the group of each input."""
    return torch.arange(in_features, device=device) // settings.rows_per_group(in_features)


def pack(
    codes: torch.Tensor,
    grid: Grid,
    settings: QuantSettings,
    *,
    method: str,
    bias: torch.Tensor | None = None,
    perm: torch.Tensor | None = None,
) -> PackedWeight:
    """A record of codes [N, K], in the order of `perm` if given, and tables [N, G].

    Sizes: K must fill whole words (see `PackedWeight`).
    """
    out_features, in_features = codes.shape
    zeros = grid.zeros.t().contiguous().to(torch.uint8)
    return PackedWeight(
        bits=settings.bits,
        codes=pack_codes(codes.t().to(torch.int32), settings.bits),
        scales=grid.scales.t().contiguous().to(settings.scale_dtype),
        group_size=settings.rows_per_group(in_features),
        in_features=in_features,
        out_features=out_features,
        zero_const=2 ** (settings.bits - 1) if settings.sym else None,
        zeros=None if settings.sym else zeros,
        perm=None if perm is None else perm.to(torch.int32),
        bias=None if bias is None else bias.to(settings.dense_dtype),
        origin={"format": "quantized", "method": method},
    )
