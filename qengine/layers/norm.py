"""RMSNorm with the residual addition before it.

``y = x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, the mean taken in float32 (Zhang and Sennrich 2019,
as the Llama family uses it). It does not own the residual stream: callers pass it, and it is changed in place.
"""

from __future__ import annotations

import torch

from quant_kernels.ops.base import LayerOps


class RMSNorm:
    """Normalizes rows of a residual stream; weight [hidden] in the compute dtype."""

    def __init__(self, weight: torch.Tensor, eps: float, ops: LayerOps) -> None:
        self.weight = weight
        self.eps = eps
        self.ops = ops

    def add(
        self, sums: torch.Tensor | None, residual: torch.Tensor, places: torch.Tensor | None = None
    ) -> torch.Tensor:
        """norm(residual + sums) [rows, hidden]; the residual [rows, hidden] becomes that sum.

        Args:
            sums: partial sums [S, rows, hidden] of the block before, None before the first.
            places: where the next linear wants the columns.
        """
        return self.ops.add_rms_norm(sums, residual, self.weight, self.eps, places)
