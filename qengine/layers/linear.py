"""Linear layers over prepared weights: one matmul where the parts fuse, several where they do not.

A merged linear (qkv, gate_up) concatenates its parts along the outputs. Invariant: the result equals running every
part alone and concatenating. Layers never learn which file format a weight came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quant_kernels.linear.cpu_int8 import KERNEL as CPU_INT8
from quant_kernels.linear.dispatch import PreparedLinear, Target, choose, prepare
from quant_kernels.linear.plan import LinearPlan, plan
from quant_kernels.ops.base import LayerOps
from quant_kernels.packed_weight import DenseWeight, PackedWeight
from quant_kernels.packing import can_concat, concat_biases, concat_outputs

Weight = PackedWeight | DenseWeight


@dataclass(frozen=True, slots=True)
class MergedPlan:
    """What a linear runs as, without its weights.

    Attributes:
        plans: one where the parts fuse, one for each part where they do not.
        why_separate: why they do not; "" where they do.
        order_is_folded: its activation order has moved into the linears before it, and costs nothing.
    """

    name: str
    plans: tuple[LinearPlan, ...]
    why_separate: str = ""
    order_is_folded: bool = False


def plan_linear(name: str, parts: Sequence[Weight], target: Target, *, order_is_folded: bool = False) -> MergedPlan:
    """The plan that `Linear` of the same arguments has; see `quant_kernels.linear.plan` for what may be left out."""
    return _plan(name, *_fuse(parts, with_codes=False), target, order_is_folded)


def _plan(name: str, weights: Sequence[Weight], why_separate: str, target: Target, order_is_folded: bool) -> MergedPlan:
    return MergedPlan(name, tuple(plan(w, target) for w in weights), why_separate, order_is_folded)


def _fuse(parts: Sequence[Weight], *, with_codes: bool) -> tuple[list[Weight], str]:
    """The parts as one weight [sum of outputs]; or as they are, with the reason, where they cannot be one.

    Without codes those of the fused weight are on the meta device, for `prepare` to take them piece by piece.
    """
    if len(parts) == 1:
        return list(parts), ""
    dense = [p for p in parts if isinstance(p, DenseWeight)]
    packed = [p for p in parts if isinstance(p, PackedWeight)]
    if len(dense) == len(parts):
        bias = concat_biases([p.bias for p in dense], [p.out_features for p in dense])
        return [DenseWeight(torch.cat([p.weight for p in dense]), bias)], ""
    if len(packed) < len(parts):
        return list(parts), "some parts are quantized and some are not"
    possible, reason = can_concat(packed)
    return ([concat_outputs(packed, with_codes=with_codes)], "") if possible else (list(parts), reason)


class Linear:
    """y = x W + b for one weight or several side by side; x [M, K] to [M, N]. `plan` says what runs, and why.

    In a decoder layer `partial_sums` leaves the sum of a split to the next operation, and `places` tells the one before
    in which order this one wants its columns. Called alone, it takes and gives columns in their own order.
    """

    def __init__(
        self,
        name: str,
        parts: Sequence[Weight],
        target: Target,
        *,
        order_is_folded: bool = False,
        is_sensitive: bool = False,
    ) -> None:
        in_pieces = choose(parts[0], target)[0] == CPU_INT8
        weights, why_separate = _fuse(parts, with_codes=not in_pieces)
        is_merged = in_pieces and len(weights) < len(parts)
        pieces = [p.codes for p in parts if isinstance(p, PackedWeight)] if is_merged else []
        del parts  # They go before the fused ones are laid out.
        self.name = name
        self.target = target
        self.plan = _plan(name, weights, why_separate, target, order_is_folded)
        self.parts: list[PreparedLinear] = [
            prepare(w, target, is_sensitive=is_sensitive, pieces=pieces) for w in weights
        ]
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

    def in_float32(self, x: torch.Tensor) -> torch.Tensor:
        """x [M, K] to [M, N] in float32, not rounded before where the kernel has more."""
        return self.parts[0].in_float32(x) if len(self.parts) == 1 else self(x).float()

    def partial_sums(self, x: torch.Tensor) -> torch.Tensor:
        """x [M, K], columns at their `places`, to [S, M, N] that add up to the result."""
        return self.parts[0].partial_sums(x) if len(self.parts) == 1 else self(x).unsqueeze(0)

    def silu_mul(self, x: torch.Tensor, ops: LayerOps, places: torch.Tensor | None) -> torch.Tensor:
        """silu(gate) * up of a linear [gate | up]: [M, N / 2], columns where the next linear wants them."""
        product = self.parts[0].try_silu_mul(x) if len(self.parts) == 1 and places is None else None
        return ops.silu_mul(self.partial_sums(x), x.dtype, places) if product is None else product
