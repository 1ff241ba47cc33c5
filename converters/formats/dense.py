"""Linears that are not quantized: ``P.weight`` [out, in] and perhaps ``P.bias``.

Invariant: the tensor is passed on as it is, in the file's dtype.
"""

from __future__ import annotations

from converters.formats.base import read_bias
from converters.formats.dense_headers import DenseHeaders
from converters.source import LinearSlot
from converters.tensors import ReadableCheckpoint
from quant_kernels.packed_weight import DenseWeight


class DenseFormat(DenseHeaders):
    """Reads plain linears."""

    def read(self, slot: LinearSlot, checkpoint: ReadableCheckpoint) -> DenseWeight:
        """The weight in the file's dtype."""
        return DenseWeight(checkpoint.read(f"{slot.name}.weight"), read_bias(slot, checkpoint))
