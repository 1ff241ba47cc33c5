"""LayerOps in plain torch: the CPU's, where a call costs little and torch's own kernels are the fastest there are.

Rope's angles come gathered per row. Invariant: whatever torch rounds between two operations is rounded to the compute
dtype, as transformers does it. Activation order is the linears' own business here: `places` is never asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from quant_kernels.attention.gathered import Segment, paged_attention
from quant_kernels.attention.kv_format import LayerCache, turn, write
from quant_kernels.ops.base import Heads, StepInputs


@dataclass(frozen=True, slots=True)
class TorchInputs(StepInputs):
    """A step on the CPU.

    Attributes:
        slots: int64 [rows], where each row's key and value go.
        cos, sin: [rows, 1, head_dim / 2], the rows' angles.
        segments: rows that share an attention call.
    """

    slots: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    segments: Sequence[Segment]


class TorchOps:
    """See `LayerOps`."""

    def add_rms_norm(
        self,
        sums: torch.Tensor | None,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        places: torch.Tensor | None,
    ) -> torch.Tensor:
        assert places is None, "torch's linears order their own inputs"
        if sums is not None:
            residual += _total(sums)
        return F.rms_norm(residual, (residual.shape[-1],), weight, eps)

    def silu_mul(self, sums: torch.Tensor, dtype: torch.dtype, places: torch.Tensor | None) -> torch.Tensor:
        assert places is None, "torch's linears order their own inputs"
        gate, up = _total(sums).to(dtype).chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def store(
        self, sums: torch.Tensor, dtype: torch.dtype, heads: Heads, cache: LayerCache, inputs: StepInputs
    ) -> torch.Tensor:
        assert isinstance(inputs, TorchInputs), "inputs of another device"
        x = _total(sums).to(dtype)
        rows = x.view(x.shape[0], -1, heads.head_dim)
        num_rotated = heads.num_heads + heads.num_kv_heads
        rotated = rotate(_normalized(rows[:, :num_rotated], heads), inputs.cos, inputs.sin)
        if cache.format.is_turned:
            rotated = turn(rotated)
        write(cache, inputs.slots, rotated[:, heads.num_heads :], rows[:, num_rotated:])
        return rotated[:, : heads.num_heads]

    def attend(
        self, query: torch.Tensor, heads: Heads, cache: LayerCache, inputs: StepInputs, places: torch.Tensor | None
    ) -> torch.Tensor:
        assert isinstance(inputs, TorchInputs), "inputs of another device"
        assert places is None, "torch's linears order their own inputs"
        return paged_attention(query, cache, inputs.segments, heads.scale, heads.window).to(query.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [rows, heads, head_dim] rotated by its rows' angles; pairs are (i, i + head_dim / 2) (Su et al. 2021)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _normalized(rows: torch.Tensor, heads: Heads) -> torch.Tensor:
    if heads.norms is None:
        return rows
    query, keys = rows[:, : heads.num_heads], rows[:, heads.num_heads :]
    normed = [
        F.rms_norm(x, (heads.head_dim,), w, heads.norm_eps) for x, w in zip((query, keys), heads.norms, strict=True)
    ]
    return torch.cat(normed, dim=1)


def _total(sums: torch.Tensor) -> torch.Tensor:
    return sums[0] if len(sums) == 1 else sums.sum(0)
