"""The one place that chooses which kernel runs a linear, with the reason.

Invariant: every weight gets a prepared linear, and nothing slower than the best available is chosen without
`choose` saying why. No timing happens here: the choice follows from format, shape, dtype and device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from quant_kernels.late import try_import
from quant_kernels.linear import cpu_int4
from quant_kernels.linear.cpu_int4 import CpuInt4Linear
from quant_kernels.linear.dense import DenseLinear
from quant_kernels.linear.p16 import layout
from quant_kernels.packed_weight import DenseWeight, PackedWeight
from quant_kernels.tuning.select import Selector

P16 = "p16"
#: Triton's tensor-core path needs asynchronous copies and bfloat16.
MIN_ARCH = 80


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


@dataclass(frozen=True, slots=True)
class Target:
    """Where linears will run.

    Attributes:
        device, dtype: of activations and results.
        selector: which Triton configurations to launch; None where Triton's kernels do not run.
    """

    device: torch.device
    dtype: torch.dtype
    selector: Selector | None = None

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> Target:
        """The target with everything that the device offers.

        Raises:
            ValueError: if the tuning table of the device is damaged.
        """
        return cls(device, dtype, Selector.of(device) if device.type == "cuda" else None)


def choose(weight: PackedWeight | DenseWeight, target: Target) -> tuple[str, str]:
    """The kernel's name and why it was chosen, without preparing anything."""
    if isinstance(weight, DenseWeight):
        return DenseLinear.kernel, "the weight is not quantized"
    if target.selector is not None:
        runs, reason = _can_run_p16(weight, target)
        name = P16
    elif target.device.type == "cpu":
        runs, reason = cpu_int4.can_run(weight, target.dtype)
        name = CpuInt4Linear.kernel
    else:
        return DenseLinear.kernel, f"no quantized kernel for {target.device.type}"
    if runs:
        engine = "Triton's tensor-core kernels" if name == P16 else "torch's int4 kernel"
        return name, f"{weight.bits}-bit codes on {engine}"
    return DenseLinear.kernel, f"expanded at load: {reason}"


def prepare(weight: PackedWeight | DenseWeight, target: Target) -> PreparedLinear:
    """Lay a weight out for the target with the kernel that `choose` names."""
    kernel, _ = choose(weight, target)
    if isinstance(weight, PackedWeight) and kernel == CpuInt4Linear.kernel:
        return CpuInt4Linear(weight)
    if isinstance(weight, PackedWeight) and kernel == P16:
        module = try_import("quant_kernels.linear.p16.prepared")
        assert module is not None, "choose has looked for triton"
        linear: PreparedLinear = module.P16Linear(weight, target.dtype, target.device, target.selector)
        return linear
    return DenseLinear(weight, target.dtype, target.device)


def _can_run_p16(weight: PackedWeight, target: Target) -> tuple[bool, str]:
    assert target.selector is not None, "asked only where there is one"
    card = target.selector.card
    if card.arch < MIN_ARCH:
        return False, f"{card.name} is sm_{card.arch}, and the kernels need sm_{MIN_ARCH} or newer"
    if try_import("triton") is None:
        return False, "triton is not installed; run: pip install triton"
    return layout.can_pack(weight, target.dtype)
