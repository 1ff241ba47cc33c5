"""Linears that are not quantized, as their headers describe them: ``P.weight`` [out, in] and perhaps ``P.bias``.

Invariant: a linear that passes `check` has the shape that the model expects, in a float type. No data, no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from converters.checkpoint import TensorInfo
from converters.formats.base import FLOAT_DTYPES, bias_dtype, check_bias, check_tensor
from converters.report import Report
from converters.source import LinearSlot
from quant_kernels.footprint import WeightFacts


class DenseHeaders:
    """Knows plain linears."""

    def claims(self, name: str, tensors: Mapping[str, TensorInfo]) -> bool:
        """Whether the module has a plain weight."""
        return f"{name}.weight" in tensors

    def check(self, slot: LinearSlot, tensors: Mapping[str, TensorInfo], report: Report) -> Sequence[str]:
        """The weight must be there, [out, in], in a float type."""
        name = f"{slot.name}.weight"
        check_tensor(report, tensors[name], (slot.out_features, slot.in_features), FLOAT_DTYPES)
        return [name, *check_bias(slot, tensors, report)]

    def facts(self, slot: LinearSlot, tensors: Mapping[str, TensorInfo]) -> WeightFacts:
        """A dense weight."""
        return WeightFacts(slot.in_features, slot.out_features, bias_dtype=bias_dtype(slot, tensors))
