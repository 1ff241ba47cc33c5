"""Dense linear: what is not quantized, and what has no 4-bit kernel for its shape and dtype.

Invariant: in float32 this is the specification (`quant_kernels.reference`) itself. It expands quantized weights once,
at load, so it costs the memory of an unquantized layer: `dispatch` says so wherever it chooses it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from quant_kernels.linear.whole import WholeLinear
from quant_kernels.native.binding import Library
from quant_kernels.packed_weight import DenseWeight, PackedWeight
from quant_kernels.reference import to_dense


def stored_bytes(weight: PackedWeight | DenseWeight, dtype: torch.dtype) -> int:
    """What `DenseLinear.bytes_per_pass` is for the weight, by its sizes alone."""
    num_inputs = weight.num_inputs if isinstance(weight, PackedWeight) else weight.in_features
    return num_inputs * weight.out_features * dtype.itemsize


def torch_has_bfloat16() -> bool:
    """Whether torch's matmuls use arithmetic of this processor in bfloat16; else they are loops, five times slower."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class DenseLinear(WholeLinear):
    """y = x W^T + b with W [N, K] in the compute dtype.

    Args:
        library: multiplies bfloat16 on the CPU in float32; None for torch.
    """

    kernel = "dense"

    def __init__(
        self,
        weight: PackedWeight | DenseWeight,
        dtype: torch.dtype,
        device: torch.device,
        library: Library | None = None,
    ) -> None:
        dense = to_dense(weight, dtype)
        is_possible = device.type == "cpu" and dtype == torch.bfloat16 and dense.in_features % 8 == 0
        self._library = library if is_possible else None
        self.weight = dense.weight.to(device).contiguous()
        self.bias = None if dense.bias is None else dense.bias.to(device)
        self.in_features = dense.in_features
        self.out_features = dense.out_features

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.weight, self.bias) if t is not None)

    @property
    def bytes_per_pass(self) -> int:
        """Bytes that one multiplication must read: the weight."""
        return self.weight.numel() * self.weight.element_size()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [M, K] to [M, N]."""
        return F.linear(x, self.weight, self.bias) if self._library is None else self.in_float32(x).to(x.dtype)

    def in_float32(self, x: torch.Tensor) -> torch.Tensor:
        """The same, not rounded where it was added up in float32."""
        if self._library is None:
            return self(x).float()
        return self._library.dense(self.weight, None if self.bias is None else self.bias.float(), x)
