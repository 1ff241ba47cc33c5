"""What a quantizer is told and what it gives back: the settings, one decoder layer, its inputs, its result.

The unit is one decoder layer. A driver loads its module, says which linears share an input and what makes that input,
and hands over the hidden states; `quantize_layer` chooses codes. Whatever a later layer needs is in the written result
and in the hidden states, so a run can stop after any layer and go on from there.

Invariant: the weights of a result are exact: the codes, scales and zero points as a file will hold them, with the
scales rounded to the file's dtype before the codes were chosen. Nothing here reads or writes files, and nothing knows a
file format; what a format cannot express arrives as a setting (`min_zero`, `act_order`, `sym`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import torch
from torch import nn

from quant_kernels.packed_weight import PackedWeight


class Method(str, Enum):
    """How codes are chosen; prints as its value."""

    RTN = "rtn"
    GPTQ = "gptq"
    AWQ = "awq"
    AUTO = "auto"

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True, slots=True)
class QuantSettings:
    """What to make of a linear.

    Attributes:
        method: how codes are chosen; RTN alone works without inputs.
        bits: of a code, 4 or 8.
        group_size: inputs that share a scale; -1 for all of them. A last short group is legal.
        sym: the zero point is 2**(bits - 1) everywhere.
        act_order: GPTQ and AUTO may put the inputs of a group together by importance, so that the record has a `perm`.
            Without it columns are still visited by importance, and groups stay neighbours.
        min_zero: the least zero point; 1 for files that store it less one.
        scale_dtype: what the file's scales are rounded to.
        dense_dtype: what the file's other tensors are rounded to: norms and biases that absorb a scale.
        damping: fraction of the Hessian's mean diagonal that is added to it; grows if the factorization fails.
    """

    method: Method
    bits: int = 4
    group_size: int = 128
    sym: bool = False
    act_order: bool = False
    min_zero: int = 0
    scale_dtype: torch.dtype = torch.float16
    dense_dtype: torch.dtype = torch.float16
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits is {self.bits}, expected 4 or 8")
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"group_size is {self.group_size}, expected -1 or a positive number")
        if not 0 <= self.min_zero < self.max_code:
            raise ValueError(f"min_zero is {self.min_zero}, expected 0 to {self.max_code - 1}")
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping is {self.damping}, expected more than 0 and at most 1")

    @property
    def max_code(self) -> int:
        """The largest code."""
        return int(2**self.bits - 1)

    def rows_per_group(self, in_features: int) -> int:
        """Inputs that share a scale in a linear of so many inputs."""
        return in_features if self.group_size == -1 else min(self.group_size, in_features)


@dataclass(frozen=True, slots=True)
class LinearGroup:
    """Linears that are fed the same tensor, in the order in which the layer runs its groups.

    Attributes:
        names: of the linears inside the layer, such as "self_attn.q_proj".
        producer: the norm or the linear inside the layer whose output, channel by channel, is this group's input up to
            operations that keep a channel's factor (the product with an activated gate; attention, for values). None
            where no factor can be moved.
        producer_channels: int64 [inputs], the producer's channel that makes each input, for grouped-query attention,
            where a value feeds several inputs of the output projection; None for one to one.
    """

    names: tuple[str, ...]
    producer: str | None = None
    producer_channels: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class LayerView:
    """One decoder layer (or the head of the model), ready to run.

    Attributes:
        name: as in the checkpoint, such as "model.layers.3"; used in reports and errors.
        module: in float32 on the device that computes, original weights. `quantize_layer` leaves the quantized weights
            (and changed norms) in it, so that running it afterwards gives the next layer's inputs.
        groups: what is to be quantized; linears that are skipped are not listed.
    """

    name: str
    module: nn.Module
    groups: tuple[LinearGroup, ...]

    def linear(self, name: str) -> nn.Linear:
        """The linear of this name inside the layer."""
        module = self.module.get_submodule(name)
        if not isinstance(module, nn.Linear):
            raise TypeError(f"{self.name}.{name} is a {type(module).__name__}, expected a Linear")
        return module


class LayerInputs(Protocol):
    """The hidden states at a layer, batch by batch; no position is padding. Everything is float32, [B, T, hidden]."""

    def __len__(self) -> int:
        """Number of batches."""

    def hidden(self, index: int) -> torch.Tensor:
        """What the quantized layers before this one make of batch `index`, on the layer's device."""

    def sample(self, index: int, row: int) -> int:
        """The number in the calibration of what is row `row` of batch `index`, for errors."""

    def run(self, module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The layer's output for hidden states of one batch, with positions and mask as the model gives them.

        Keeps gradients where they are enabled.
        """


@dataclass(frozen=True, slots=True)
class LinearReport:
    """What was done to one linear. Errors are the mean square of (quantized - original output) over that of the output.

    Attributes:
        name: with the layer's name in front.
        method: what chose the codes: "gptq", "awq", "rtn" ...
        error: of the written weight.
        rtn_error: of plain rounding to nearest of the original weight, before factors are folded into it, for
            comparison. Both are NaN without inputs.
        notes: what the user should know, such as a fall back to rounding.
    """

    name: str
    method: str
    error: float
    rtn_error: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LayerResult:
    """What a layer became.

    Attributes:
        weights: linear inside the layer -> record as the file will hold it, bias included.
        tensors: other parameters inside the layer that changed, in `dense_dtype`, such as "input_layernorm.weight".
        report: a line for each linear.
    """

    weights: dict[str, PackedWeight]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    report: Sequence[LinearReport] = ()


class QuantizationError(ValueError):
    """A layer that cannot be quantized: what was found, where, and what to do."""
