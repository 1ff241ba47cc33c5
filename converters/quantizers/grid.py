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


@dataclass(frozen=True, slots=True)
class Grid:
    """Scales and zero points of groups of weights, float32 of any one shape; the zero points are integers."""

    scales: torch.Tensor
    zeros: torch.Tensor
    max_code: int

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """The nearest codes, as floats; the tables broadcast against `weight`."""
        return (torch.round(weight / self.scales) + self.zeros).clamp_(0, self.max_code)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """What codes stand for."""
        return (codes - self.zeros) * self.scales

    def nearest(self, weight: torch.Tensor) -> torch.Tensor:
        """The nearest values."""
        return self.values(self.codes(weight))

    def group(self, index: int) -> Grid:
        """One group's column of the tables: [N, 1]."""
        part = slice(index, index + 1)
        return Grid(self.scales[:, part], self.zeros[:, part], self.max_code)

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
    zeros = torch.round(-low / scales).clamp_(settings.min_zero, top)
    return Grid(scales, zeros, top)


def round_scales(scales: torch.Tensor, settings: QuantSettings) -> torch.Tensor:
    """Scales as the file holds them; too small ones become the smallest normal number, so that none is zero."""
    limits = torch.finfo(settings.scale_dtype)
    return scales.clamp(limits.tiny, limits.max).to(settings.scale_dtype).float()


def grouped(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """[N, K] as [N, G, rows]; a last short group is filled by repeating the last input, which changes no range."""
    short = -weight.shape[1] % rows
    if short:
        weight = torch.cat([weight, weight[:, -1:].expand(-1, short)], dim=1)
    return weight.reshape(weight.shape[0], -1, rows)


def find_grid(weight: torch.Tensor, settings: QuantSettings) -> Grid:
    """The grid of each group of a weight: tables [N, G]."""
    groups = grouped(weight, settings.rows_per_group(weight.shape[1]))
    return range_grid(groups.amin(dim=2), groups.amax(dim=2), settings)


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
