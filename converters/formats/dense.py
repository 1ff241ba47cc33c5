"""Linears that are not quantized: ``P.weight`` [out, in] and perhaps ``P.bias``.

Invariant: the tensor is passed on as it is, in the file's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from converters.checkpoint import Checkpoint, TensorInfo
from converters.formats.base import FLOAT_DTYPES, check_bias, check_tensor, read_bias
from converters.report import Report
from converters.source import LinearSlot
from quant_kernels.packed_weight import DenseWeight


class DenseFormat:
    """Reads plain linears."""

    def claims(self, name: str, tensors: Mapping[str, TensorInfo]) -> bool:
        """Whether the module has a plain weight."""
        return f"{name}.weight" in tensors

    def check(self, slot: LinearSlot, tensors: Mapping[str, TensorInfo], report: Report) -> Sequence[str]:
        """The weight must be there, [out, in], in a float type."""
        name = f"{slot.name}.weight"
        check_tensor(report, tensors[name], (slot.out_features, slot.in_features), FLOAT_DTYPES)
        return [name, *check_bias(slot, tensors, report)]

    def read(self, slot: LinearSlot, checkpoint: Checkpoint) -> DenseWeight:
        """The weight in the file's dtype."""
        return DenseWeight(checkpoint.read(f"{slot.name}.weight"), read_bias(slot, checkpoint))
