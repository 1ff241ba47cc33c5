"""Linear layers over prepared weights: one matmul where the parts fuse, several where they do not.

A merged linear (qkv, gate_up) concatenates its parts along the outputs. Invariant: the result equals running every
part alone and concatenating. Layers never learn which file format a weight came from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quant_kernels.linear.dispatch import PreparedLinear, Target, choose, prepare
from quant_kernels.ops.base import LayerOps
from quant_kernels.packed_weight import DenseWeight, PackedWeight
from quant_kernels.packing import can_concat, concat_biases, concat_outputs

Weight = PackedWeight | DenseWeight


def try_fuse(parts: Sequence[Weight]) -> Weight | None:
    """The parts as one weight [sum of outputs], or None where they differ in kind, bits, groups or row order."""
    if len(parts) == 1:
        return parts[0]
    dense = [p for p in parts if isinstance(p, DenseWeight)]
    packed = [p for p in parts if isinstance(p, PackedWeight)]
    if len(dense) == len(parts):
        bias = concat_biases([p.bias for p in dense], [p.out_features for p in dense])
        return DenseWeight(torch.cat([p.weight for p in dense]), bias)
    if len(packed) == len(parts) and can_concat(packed)[0]:
        return concat_outputs(packed)
    return None


class Linear:
    """y = x W + b for one weight or several side by side; x [M, K] to [M, N].

    In a decoder layer `partial_sums` leaves the sum of a split to the next operation, and `places` tells the one before
    in which order this one wants its columns. Called alone, it takes and gives columns in their own order.
    """

    def __init__(self, name: str, parts: Sequence[Weight], target: Target) -> None:
        fused = try_fuse(parts)
        weights = list(parts) if fused is None else [fused]
        self.name = name
        self.choices = [choose(w, target) for w in weights]
        self.parts: list[PreparedLinear] = [prepare(w, target) for w in weights]
        self.in_features = self.parts[0].in_features
        self.out_features = sum(p.out_features for p in self.parts)

    @property
    def num_bytes(self) -> int:
        return sum(p.num_bytes for p in self.parts)

    @property
    def places(self) -> torch.Tensor | None:
        """int32 [K]: where `partial_sums` wants each column of x; None for its own place."""
        return self.parts[0].places if len(self.parts) == 1 else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if len(self.parts) == 1:
            return self.parts[0](x)
        return torch.cat([part(x) for part in self.parts], dim=-1)

    def partial_sums(self, x: torch.Tensor) -> torch.Tensor:
        """x [M, K], columns at their `places`, to [S, M, N] that add up to the result."""
        return self.parts[0].partial_sums(x) if len(self.parts) == 1 else self(x).unsqueeze(0)

    def silu_mul(self, x: torch.Tensor, ops: LayerOps, places: torch.Tensor | None) -> torch.Tensor:
        """silu(gate) * up of a linear [gate | up]: [M, N / 2], columns where the next linear wants them."""
        product = self.parts[0].try_silu_mul(x) if len(self.parts) == 1 and places is None else None
        return ops.silu_mul(self.partial_sums(x), x.dtype, places) if product is None else product
