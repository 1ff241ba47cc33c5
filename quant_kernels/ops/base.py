"""LayerOps: what a decoder layer asks of a device between its matmuls, in as few launches as the device allows.

A layer is norm, qkv, store, attend, o, norm, gate_up, down. Matmuls leave partial sums [S, M, N] (S = 1: a result),
and whoever reads them adds them up; an operation before a matmul stores its columns where that one wants them
(`places`). Invariant: both implementations compute the same function to the roundings of their dtypes. They hold no
weights and no state of a sequence; a step's `StepInputs` are made for the implementation that gets them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from quant_kernels.attention.kv_format import LayerCache


class StepInputs:
    """Where the rows of a step belong: positions, slots, block tables. Opaque to layers."""


@dataclass(frozen=True, slots=True)
class Heads:
    """The shape of one layer's attention.

    Attributes:
        norms: RMSNorm weights [2, head_dim] of each head of q and of k before rope, or None.
        window: a token sees itself and window - 1 tokens before it; None for all.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None
    norms: torch.Tensor | None = None
    norm_eps: float = 0.0

    @property
    def scale(self) -> float:
        """Of products of queries and keys."""
        return float(self.head_dim**-0.5)


class LayerOps(Protocol):
    """The operations, for one device."""

    def add_rms_norm(
        self,
        sums: torch.Tensor | None,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        places: torch.Tensor | None,
    ) -> torch.Tensor:
        """Add partial sums [S, M, H] (None: nothing) to the residual [M, H] in place; its norm [M, H]."""
        ...

    def silu_mul(self, sums: torch.Tensor, dtype: torch.dtype, places: torch.Tensor | None) -> torch.Tensor:
        """silu(gate) * up of partial sums [S, M, 2 N] of [gate | up]: [M, N] in `dtype`."""
        ...

    def store(
        self, sums: torch.Tensor, dtype: torch.dtype, heads: Heads, cache: LayerCache, inputs: StepInputs
    ) -> torch.Tensor:
        """Partial sums of [q | k | v]: keys and values, normed and rotated, go to the cache; queries come back.

        Returns:
            [M, num_heads, head_dim] in `dtype`.
        """
        ...

    def attend(
        self, query: torch.Tensor, heads: Heads, cache: LayerCache, inputs: StepInputs, places: torch.Tensor | None
    ) -> torch.Tensor:
        """Attention of all rows over the cache: [M, num_heads * head_dim] in the query's dtype."""
        ...
