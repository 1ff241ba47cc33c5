"""The one place that chooses which kernel runs a linear, with the reason.

Invariant: every weight gets a prepared linear, and nothing slower than the best available is chosen without
`Prepared.reason` saying why. No timing happens here: the choice follows from format, shape, dtype and device.
"""

from __future__ import annotations

from typing import Protocol

import torch

from quant_kernels.linear import cpu_int4
from quant_kernels.linear.cpu_int4 import CpuInt4Linear
from quant_kernels.linear.dense import DenseLinear
from quant_kernels.packed_weight import DenseWeight, PackedWeight


class PreparedLinear(Protocol):
    """A linear laid out for one device: x [M, K] in the compute dtype to [M, N]."""

    kernel: str
    in_features: int
    out_features: int

    @property
    def num_bytes(self) -> int:
        """Bytes of device memory held."""
        ...

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


def choose(weight: PackedWeight | DenseWeight, dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
    """The kernel's name and why it was chosen, without preparing anything."""
    if isinstance(weight, DenseWeight):
        return DenseLinear.kernel, "the weight is not quantized"
    if device.type != "cpu":
        return DenseLinear.kernel, f"no quantized kernel for {device.type}"
    runs, reason = cpu_int4.can_run(weight, dtype)
    if runs:
        return CpuInt4Linear.kernel, f"{weight.bits}-bit codes on torch's int4 kernel"
    return DenseLinear.kernel, f"expanded at load: {reason}"


def prepare(weight: PackedWeight | DenseWeight, dtype: torch.dtype, device: torch.device) -> PreparedLinear:
    """Lay a weight out for `device` with the kernel that `choose` names."""
    kernel, _ = choose(weight, dtype, device)
    if kernel == CpuInt4Linear.kernel and isinstance(weight, PackedWeight):
        return CpuInt4Linear(weight)
    return DenseLinear(weight, dtype, device)
