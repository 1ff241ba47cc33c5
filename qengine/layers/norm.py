"""RMSNorm, alone and with the residual addition before it.

``y = x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, the mean taken in float32 (Zhang and Sennrich 2019,
as the Llama family uses it). It does not own the residual stream: callers pass it and get it back.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


class RMSNorm:
    """Normalizes [..., size] rows; weight [size] in the compute dtype."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self.weight = weight
        self.eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + residual), x + residual). Changes `residual` in place: it is the running sum."""
        residual += x
        return self(residual), residual
