"""What a reader of one kind of quantized linear provides, and the parts that all of them share.

Invariant: `check` looks at headers alone and reports every problem; after it, `read` can fail only on bad data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

from converters.checkpoint import TensorInfo
from converters.detect import QuantizationScheme
from converters.errors import CheckpointError
from converters.files import shown
from converters.report import Notices, Report, shape_text
from converters.source import LinearSlot, Weight
from quant_kernels.footprint import WeightFacts

if TYPE_CHECKING:
    import torch

    from converters.tensors import ReadableCheckpoint

#: Types of weights, scales and biases, and what torch calls them.
DTYPE_NAMES: Mapping[str, str] = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
FLOAT_DTYPES = tuple(DTYPE_NAMES)


class LinearHeaders(Protocol):
    """Knows linears that are stored in one way by their headers."""

    def claims(self, name: str, tensors: Mapping[str, TensorInfo]) -> bool:
        """Whether module `name` is stored in this way."""
        ...

    def check(self, slot: LinearSlot, tensors: Mapping[str, TensorInfo], report: Report) -> Sequence[str]:
        """Compare the headers with the slot; returns the names of the tensors that belong to it."""
        ...

    def facts(self, slot: LinearSlot, tensors: Mapping[str, TensorInfo]) -> WeightFacts:
        """What a checked slot will be read as, as far as headers tell."""
        ...


class QuantizedHeaders:
    """What those of quantized linears have in common: a scheme that the file declares, and tensors named by the module.

    Attributes:
        codes: what a module calls its codes.
    """

    codes: ClassVar[str] = "qweight"

    def __init__(self, scheme: QuantizationScheme, notices: Notices) -> None:
        self._scheme = scheme
        self._notices = notices

    def claims(self, name: str, tensors: Mapping[str, TensorInfo]) -> bool:
        """Whether the module has packed codes."""
        return f"{name}.{self.codes}" in tensors


class LinearFormat(LinearHeaders, Protocol):
    """Reads them too."""

    def read(self, slot: LinearSlot, checkpoint: ReadableCheckpoint) -> Weight:
        """The weight. Raises CheckpointError for data that cannot be meant."""
        ...


def check_tensor(report: Report, info: TensorInfo, shape: Sequence[int], dtypes: Sequence[str]) -> bool:
    """Report a tensor whose shape or dtype differs from what is expected; returns whether it is right."""
    if info.shape == tuple(shape) and info.dtype in dtypes:
        return True
    report.wrong(info.name, str(info), shape_text(" or ".join(dtypes), shape))
    return False


def check_bias(slot: LinearSlot, tensors: Mapping[str, TensorInfo], report: Report) -> list[str]:
    """A bias may be there although the architecture has none, but not the other way round."""
    name = f"{slot.name}.bias"
    info = tensors.get(name)
    if info is not None:
        check_tensor(report, info, (slot.out_features,), FLOAT_DTYPES)
        return [name]
    if slot.has_bias:
        report.missing(name, shape_text("F16", (slot.out_features,)))
    return []


def bias_dtype(slot: LinearSlot, tensors: Mapping[str, TensorInfo]) -> str | None:
    """Of the bias that will be kept: one that the architecture lacks is taken for zeros."""
    return DTYPE_NAMES[tensors[f"{slot.name}.bias"].dtype] if slot.has_bias else None


def read_bias(slot: LinearSlot, checkpoint: ReadableCheckpoint) -> torch.Tensor | None:
    """The bias. One that the architecture lacks is dropped if it is all zero, and kept if it is not."""
    name = f"{slot.name}.bias"
    if name not in checkpoint.tensors:
        return None
    bias = checkpoint.read(name)
    return bias if slot.has_bias or bool(bias.any()) else None


def read_scales(checkpoint: ReadableCheckpoint, name: str) -> torch.Tensor:
    """Scales, which must be finite: one NaN would make every output NaN."""
    scales = checkpoint.read(name)
    require_finite(scales, str(checkpoint.tensors[name].file.path), name)
    return scales


def require_finite(values: torch.Tensor, path: str, name: str) -> None:
    """Raise a CheckpointError if anything in `values` is NaN or infinite."""
    # The extremes are NaN if anything is, and take a twentieth of the time of a test of each.
    if values.numel() and not all(extreme.isfinite() for extreme in values.aminmax()):
        count = int((~values.isfinite()).sum())
        raise CheckpointError(
            f"{path}: {shown(name)} has {count} values that are NaN or infinite; the file is damaged, download it again"
        )
