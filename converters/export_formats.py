"""Names of the formats that can be written. Without torch, so that a command can check its options at once."""

from __future__ import annotations

from typing import Literal

ExportFormat = Literal["awq", "gptq", "compressed-tensors", "dense"]
EXPORT_FORMATS: tuple[ExportFormat, ...] = ("awq", "gptq", "compressed-tensors", "dense")
#: Inputs and outputs of a quantized linear come in multiples of these, for every reader of the format.
MULTIPLES = {"awq": (8, 8), "gptq": (32, 32), "compressed-tensors": (8, 1)}
