"""Algorithms that choose 4-bit codes: rounding, GPTQ, AWQ and their combination, one decoder layer at a time."""

from converters.quantizers.base import (
    LayerInputs,
    LayerResult,
    LayerView,
    LinearGroup,
    LinearReport,
    Method,
    QuantizationError,
    QuantSettings,
)
from converters.quantizers.layer import quantize_layer

__all__ = [
    "LayerInputs",
    "LayerResult",
    "LayerView",
    "LinearGroup",
    "LinearReport",
    "Method",
    "QuantSettings",
    "QuantizationError",
    "quantize_layer",
]
