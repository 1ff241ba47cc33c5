"""How far a kernel may be from its reference, derived from the roundings it makes.

Errors are relative to the result or to the root mean square of its row, whichever is larger: a result near zero is made
of products as large as its neighbours'. A type's unit roundoff is u: 2^-11 for float16, 2^-8 for bfloat16.

- Rounding the result: at most u, on average half of it.
- Rounding each weight r times: K errors, evenly spread within +-u of their products, add up like a random walk to a
  standard deviation of u sqrt(r / 3). Of a million results the worst stays within five of those.
- float32 sums: the tensor cores' inexact additions, 3e-5 in all.
- float16 sums: one rounding per 16 inputs of a step; five standard deviations of them stay below 16 u.

Invariant: a bound depends on the configuration alone, never on what was measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from quant_kernels.scheme import Scheme, ZeroKind

UNIT_ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 0.0}
_SUMS = 3e-5
_WORST = 5.0
_HALF_SUMS = 16.0


@dataclass(frozen=True, slots=True)
class Error:
    """The worst and the average error of a result, relative as described above."""

    worst: float
    mean: float

    def within(self, bound: Error) -> bool:
        """Whether both are at most the bound's; NaN is not."""
        return self.worst <= bound.worst and self.mean <= bound.mean


def error(got: torch.Tensor, expected: torch.Tensor) -> Error:
    """The error of `got` [M, N] against float32 `expected` [M, N]."""
    rms = expected.float().pow(2).mean(dim=-1, keepdim=True).sqrt()
    size = torch.maximum(expected.float().abs(), rms).clamp_min(torch.finfo(torch.float32).tiny)
    relative = (got.float() - expected.float()).abs() / size
    return Error(float(relative.max()), float(relative.mean()))


def bound(scheme: Scheme, result: torch.dtype, *, scale_weight: bool, half_sums: bool = False) -> Error:
    """What a kernel may be off, by how it computes and what type its result has."""
    u, out = UNIT_ROUNDOFF[scheme.dtype], UNIT_ROUNDOFF[result]
    deviation = u * math.sqrt(_weight_roundings(scheme, scale_weight=scale_weight) / 3)
    halves = _HALF_SUMS * u if half_sums else 0.0
    return Error(out + _WORST * deviation + halves + _SUMS, out / 2 + deviation + halves / _WORST + _SUMS)


def _weight_roundings(scheme: Scheme, *, scale_weight: bool) -> int:
    """How often each weight is rounded to the activations' type before it is multiplied."""
    roundings = 1 if scheme.zero == ZeroKind.CODEBOOK else 0
    if scale_weight or scheme.zero == ZeroKind.MIN:
        roundings += 1 + (scheme.scale_dtype != scheme.dtype)
    if scheme.zero == ZeroKind.MIN:
        roundings += 2  # The centred min, and its addition.
    return roundings
