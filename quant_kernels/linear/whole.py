"""What linears on torch's matmuls share: inputs in their own order, results whole, nothing fused after them."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch


class WholeLinear(ABC):
    """The parts of `PreparedLinear` that need no kernel of ours."""

    places: torch.Tensor | None = None

    @abstractmethod
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [M, K] to [M, N]."""

    def partial_sums(self, x: torch.Tensor) -> torch.Tensor:
        """x [M, K] to [1, M, N]."""
        return self(x).unsqueeze(0)

    def in_float32(self, x: torch.Tensor) -> torch.Tensor:
        """x [M, K] to [M, N] in float32, not rounded before where the kernel has more."""
        return self(x).float()

    def try_silu_mul(self, x: torch.Tensor) -> torch.Tensor | None:
        """None: the product is the next operation's."""
        return None
