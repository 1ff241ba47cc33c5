"""LinearPlan: what a weight will run as on a target, without preparing it.

Follows `dispatch.choose`, and adds what people ask next: how many bytes a multiplication reads, what a card launches.
Invariant: the plan of a weight and the linear that `dispatch.prepare` makes of it agree in kernel and bytes. Codes are
not looked at, so a record whose codes are on the meta device has the same plan.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quant_kernels.linear import cpu_int4, cpu_int8, dense
from quant_kernels.linear.cpu_int4 import CpuInt4Linear
from quant_kernels.linear.cpu_int8 import CpuInt8Linear
from quant_kernels.linear.dispatch import P16, Target, choose, packed_for
from quant_kernels.linear.p16 import layout
from quant_kernels.packed_weight import DenseWeight, PackedWeight
from quant_kernels.scheme import Scheme, ZeroKind
from quant_kernels.tuning.select import Choice, Problem, Selector

_ZERO_WORDS = {ZeroKind.CONST: "", ZeroKind.INTEGER: " asym", ZeroKind.MIN: " mins", ZeroKind.CODEBOOK: " codebook"}


@dataclass(frozen=True, slots=True)
class LinearPlan:
    """What runs one weight, K = in_features inputs to N = out_features outputs.

    Attributes:
        format: the weight as the file has it, or the compute dtype where it is not quantized. "w4 g128 asym" is 4
            bits and groups of 128 inputs (gK: all of them) with zero points of their own; "mins" are float ones.
        kernel, reason: as `dispatch.choose` says.
        bytes_per_pass: bytes that one multiplication must read: the weight and its tables.
        is_expanded: it is quantized, but runs as a dense matrix.
        gathers: there is an activation order, so the input is put in order before each multiplication.
        scheme: what the P16 kernels are compiled for; None for other kernels.
    """

    in_features: int
    out_features: int
    format: str
    kernel: str
    reason: str
    bytes_per_pass: int
    is_expanded: bool = False
    gathers: bool = False
    scheme: Scheme | None = None

    @property
    def bytes_per_weight(self) -> float:
        """Bytes read per weight of the layer, with its share of tables and padding."""
        return self.bytes_per_pass / (self.in_features * self.out_features)


def plan(weight: PackedWeight | DenseWeight, target: Target) -> LinearPlan:
    """The plan of a weight on a target."""
    kernel, reason = choose(weight, target)
    is_packed = isinstance(weight, PackedWeight)
    runs_packed = is_packed and kernel in (P16, CpuInt4Linear.kernel, CpuInt8Linear.kernel)
    return LinearPlan(
        in_features=weight.in_features,
        out_features=weight.out_features,
        format=_format(weight, target.dtype),
        kernel=kernel,
        reason=reason,
        bytes_per_pass=_stored_bytes(weight, kernel, target.dtype),
        is_expanded=is_packed and not runs_packed,
        gathers=runs_packed and isinstance(weight, PackedWeight) and weight.perm is not None,
        scheme=layout.scheme_of(weight, packed_for(target))
        if isinstance(weight, PackedWeight) and kernel == P16
        else None,
    )


def launch(planned: LinearPlan, selector: Selector | None, rows: int, *, is_gate_up: bool = False) -> Choice | None:
    """What a card launches for x of `rows` rows; None where no kernel of ours runs.

    Args:
        is_gate_up: the weight is [gate | up], which has a kernel of its own for some shapes.
    """
    if selector is None or planned.scheme is None:
        return None
    problem = Problem(rows, planned.in_features, planned.out_features, planned.scheme)
    fused = selector.gate_up(problem) if is_gate_up else None
    return fused or selector.matmul(problem)


def _stored_bytes(weight: PackedWeight | DenseWeight, kernel: str, dtype: torch.dtype) -> int:
    if isinstance(weight, PackedWeight) and kernel == P16:
        return layout.stored_bytes(weight, dtype)
    if isinstance(weight, PackedWeight) and kernel == CpuInt4Linear.kernel:
        return cpu_int4.stored_bytes(weight)
    if isinstance(weight, PackedWeight) and kernel == CpuInt8Linear.kernel:
        return cpu_int8.stored_bytes(weight)
    return dense.stored_bytes(weight, dtype)


def _format(weight: PackedWeight | DenseWeight, dtype: torch.dtype) -> str:
    if isinstance(weight, DenseWeight):
        return str(dtype).removeprefix("torch.")
    group = "gK" if weight.group_size >= weight.in_features else f"g{weight.group_size}"
    return f"w{weight.bits} {group}{_ZERO_WORDS[layout.zero_kind(weight)]}"
