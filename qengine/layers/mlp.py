"""The gated feed-forward of a decoder layer: down(silu(gate(x)) * up(x)) (Shazeer 2020, SwiGLU)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qengine.layers.linear import Linear
from qengine.parallel.group import TPGroup


class GatedMLP:
    """x [rows, hidden] to [rows, hidden]. `gate_up` yields gate and up side by side."""

    def __init__(self, gate_up: Linear, down: Linear, group: TPGroup | None = None) -> None:
        self.gate_up = gate_up
        self.down = down
        self.group = group or TPGroup.single()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.group.all_reduce(self.down(F.silu(gate).mul_(up)))
