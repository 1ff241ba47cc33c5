"""One block of the decoder: attention and MLP, each behind its norm.

Invariant: what comes in and goes out are partial sums that the next norm adds to the residual stream, so that a sum
over parts costs no pass of its own. It knows neither its place in the model nor its neighbours.
"""

from __future__ import annotations

import torch

from qengine.layers.attention import Attention
from qengine.layers.mlp import GatedMLP
from qengine.layers.norm import RMSNorm
from quant_kernels.attention.kv_format import LayerCache
from quant_kernels.ops.base import StepInputs


class DecoderLayer:
    """One transformer block; changes the residual stream in place."""

    def __init__(self, input_norm: RMSNorm, attention: Attention, post_norm: RMSNorm, mlp: GatedMLP) -> None:
        self.input_norm = input_norm
        self.attention = attention
        self.post_norm = post_norm
        self.mlp = mlp

    def __call__(
        self, sums: torch.Tensor | None, residual: torch.Tensor, cache: LayerCache, inputs: StepInputs
    ) -> torch.Tensor:
        """Partial sums [S, rows, hidden] of the previous layer, not yet in the residual, to those of this one."""
        return self.feed(self.attend(sums, residual, cache, inputs), residual)

    def attend(
        self, sums: torch.Tensor | None, residual: torch.Tensor, cache: LayerCache, inputs: StepInputs
    ) -> torch.Tensor:
        """The first half: partial sums of the previous layer to those of attention."""
        return self.attention(self.input_norm.add(sums, residual, self.attention.qkv.places), cache, inputs)

    def feed(self, attended: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The second half: partial sums of attention to those of the MLP."""
        return self.mlp(self.post_norm.add(attended, residual, self.mlp.gate_up.places))
