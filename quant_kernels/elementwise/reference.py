"""The specification of the elementwise kernels in plain torch, in float32. Only tests call it."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def add_rms_norm(
    partial_sums: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    perm: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(residual + sum), residual + sum), the first with columns in the order of `perm`; both float32 [M, H]."""
    total = residual.float() + partial_sums.float().sum(0)
    normed = F.rms_norm(total, (total.shape[-1],), weight.float(), eps)
    return normed if perm is None else normed[:, perm.long()], total


def silu_mul(partial_sums: torch.Tensor, perm: torch.Tensor | None = None) -> torch.Tensor:
    """silu(gate) * up for [S, M, 2 N] holding [gate | up], columns in the order of `perm`; float32 [M, N]."""
    gate, up = partial_sums.float().sum(0).chunk(2, dim=-1)
    product = F.silu(gate) * up
    return product if perm is None else product[:, perm.long()]
