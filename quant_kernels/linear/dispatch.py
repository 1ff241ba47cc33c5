"""The one place that chooses which kernel runs a linear, with the reason.

Invariant: every weight gets a prepared linear, and nothing slower than the best available is chosen without
`choose` saying why. No timing happens here: the choice follows from format, shape, dtype and device.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from quant_kernels.late import try_import
from quant_kernels.linear import cpu_int4, cpu_int8
from quant_kernels.linear.cpu_check import checked_library
from quant_kernels.linear.cpu_int4 import CpuInt4Linear
from quant_kernels.linear.cpu_int8 import CpuInt8Linear
from quant_kernels.linear.dense import DenseLinear, torch_has_bfloat16
from quant_kernels.linear.p16 import layout
from quant_kernels.native.binding import Library
from quant_kernels.ops.base import LayerOps
from quant_kernels.ops.torch_ops import TorchOps
from quant_kernels.packed_weight import DenseWeight, PackedWeight
from quant_kernels.packing import side_by_side
from quant_kernels.scheme import ACTIVATION_DTYPES
from quant_kernels.tuning.card import SHARED_PER_BLOCK
from quant_kernels.tuning.select import Selector

logger = logging.getLogger(__name__)

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

    @property
    def places(self) -> torch.Tensor | None:
        """int32 [K]: where `partial_sums` wants each column of x; None for its own place."""
        ...

    @property
    def bytes_per_pass(self) -> int:
        """Bytes that one multiplication must read: the weight and its tables."""
        ...

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...

    def partial_sums(self, x: torch.Tensor) -> torch.Tensor:
        """x [M, K], columns at their `places`, to [S, M, N] that add up to the result."""
        ...

    def in_float32(self, x: torch.Tensor) -> torch.Tensor:
        """x [M, K] to [M, N] in float32, not rounded before where the kernel has more."""
        ...

    def try_silu_mul(self, x: torch.Tensor) -> torch.Tensor | None:
        """silu(gate) * up of a weight [gate | up] where one kernel does it all: [M, N / 2]."""
        ...


@dataclass(frozen=True, slots=True)
class Target:
    """Where linears will run.

    Attributes:
        device, dtype: of activations and results.
        selector: which Triton configurations to launch; None where Triton's kernels do not run.
        native: our own kernels for the CPU; None to run on torch's.
    """

    device: torch.device
    dtype: torch.dtype
    selector: Selector | None = None
    native: Library | None = None

    @property
    def ops(self) -> LayerOps:
        """The operations between the linears."""
        module = None if self.selector is None else try_import("quant_kernels.ops.triton_ops")
        if module is None or self.selector is None:
            return TorchOps()
        ops: LayerOps = module.TritonOps(twin=self.selector.twin)
        return ops

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype, *, half_sums: bool = False) -> Target:
        """The target with everything that the device offers.

        Args:
            half_sums: let GeForce cards add up in float16 where there are many rows: faster, and it may overflow.

        Raises:
            ValueError: if the tuning table of the device is damaged.
        """
        if device.type != "cuda":
            return cls(device, dtype, native=checked_library() if dtype == torch.bfloat16 else None)
        return checked(cls(device, dtype, replace(Selector.of(device), half_sums=half_sums)))


def checked(target: Target) -> Target:
    """The target, set to plain Triton if the assembly does not give the right bits on it."""
    selector = target.selector
    linear, cache = (try_import(f"quant_kernels.{part}.self_test") for part in ("linear.p16", "attention"))
    if (
        selector is None
        or linear is None
        or cache is None
        or selector.card.arch < MIN_ARCH
        or target.dtype not in ACTIVATION_DTYPES
    ):
        return target
    if selector.card.arch not in SHARED_PER_BLOCK:
        known = ", ".join(f"sm_{arch}" for arch in SHARED_PER_BLOCK)
        logger.warning("the kernels were made for %s and have not been seen on sm_%d", known, selector.card.arch)
    if linear.assembly_is_right(target.device, target.dtype) and cache.words_are_right(target.device):
        return target
    logger.warning(
        "the kernels' assembly gives wrong results on %s with this triton; running plain Triton, which is slower. "
        "Please report it with the output of `python -m benchmarks.gpu_check tests`",
        selector.card.name,
    )
    return replace(target, selector=replace(selector, twin=True))


def choose(weight: PackedWeight | DenseWeight, target: Target) -> tuple[str, str]:
    """The kernel's name and why it was chosen, without preparing anything."""
    if isinstance(weight, DenseWeight):
        return DenseLinear.kernel, "the weight is not quantized"
    if target.selector is not None:
        runs, reason = _can_run_p16(weight, target)
        name = P16
    elif target.device.type == "cpu":
        if target.native is not None and cpu_int8.can_run(weight, target.dtype)[0]:
            return CpuInt8Linear.kernel, f"{weight.bits}-bit codes on our int8 kernels ({target.native.level.text})"
        runs, reason = cpu_int4.can_run(weight, target.dtype)
        name = CpuInt4Linear.kernel
    else:
        return DenseLinear.kernel, f"no quantized kernel for {target.device.type}"
    if runs:
        engine = "Triton's tensor-core kernels" if name == P16 else "torch's int4 kernel"
        return name, f"{weight.bits}-bit codes on {engine}"
    return DenseLinear.kernel, f"expanded at load: {reason}"


def prepare(
    weight: PackedWeight | DenseWeight,
    target: Target,
    *,
    is_sensitive: bool = False,
    pieces: Sequence[torch.Tensor] = (),
) -> PreparedLinear:
    """Lay a weight out for the target with the kernel that `choose` names.

    Args:
        is_sensitive: errors of its result weigh more than those of others; a kernel that rounds activations to 8 bits
            rounds them more finely here, and for all weights of 8 bits.
        pieces: the codes of neighbouring outputs, where those of the weight itself are on the meta device.
    """
    kernel, _ = choose(weight, target)
    if isinstance(weight, PackedWeight) and kernel == CpuInt8Linear.kernel:
        assert target.native is not None, "chosen only where there is one"
        return CpuInt8Linear(weight, target.native, is_fine=is_sensitive or weight.bits == 8, pieces=pieces)
    if isinstance(weight, PackedWeight) and pieces:
        weight = replace(weight, codes=side_by_side(pieces))
    if isinstance(weight, PackedWeight) and kernel == CpuInt4Linear.kernel:
        return CpuInt4Linear(weight)
    if isinstance(weight, PackedWeight) and kernel == P16:
        module = try_import("quant_kernels.linear.p16.prepared")
        assert module is not None, "choose has looked for triton"
        linear: PreparedLinear = module.P16Linear.of(weight, packed_for(target), target.device, target.selector)
        return linear
    return DenseLinear(weight, target.dtype, target.device, None if torch_has_bfloat16() else target.native)


def _can_run_p16(weight: PackedWeight, target: Target) -> tuple[bool, str]:
    assert target.selector is not None, "asked only where there is one"
    card = target.selector.card
    if card.arch < MIN_ARCH:
        return False, f"{card.name} is sm_{card.arch}, and the kernels need sm_{MIN_ARCH} or newer"
    if try_import("triton") is None:
        return False, "triton is not installed; run: pip install triton"
    return layout.can_pack(weight, packed_for(target))


def packed_for(target: Target) -> torch.dtype:
    """The activations that P16 is laid out for: float32's, which the interpreter alone is given, share float16's."""
    is_interpreted = target.device.type == "cpu"
    return torch.float16 if is_interpreted and target.dtype == torch.float32 else target.dtype
