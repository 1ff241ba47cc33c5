"""The gated feed-forward of a decoder layer: down(silu(gate(x)) * up(x)) (Shazeer 2020, SwiGLU)."""

from __future__ import annotations

import torch

from qengine.layers.linear import Linear
from qengine.parallel.group import TPGroup
from quant_kernels.ops.base import LayerOps


class GatedMLP:
    """x [rows, hidden] to partial sums [S, rows, hidden]. `gate_up` yields gate and up side by side.

    On several ranks each has some of the columns between them, and what `down` makes of those is added up.
    """

    def __init__(self, gate_up: Linear, down: Linear, ops: LayerOps, group: TPGroup | None = None) -> None:
        self.gate_up = gate_up
        self.down = down
        self.ops = ops
        self.group = group or TPGroup.single()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: columns where `gate_up` wants them."""
        product = self.gate_up.silu_mul(x, self.ops, self.down.places)
        return self.group.add_up(self.down.partial_sums(product), x.dtype)
