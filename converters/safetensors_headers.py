"""SafetensorsHeaders: a folder of safetensors as a HeaderSource, quantized or not. Without torch.

Whether a linear is quantized is decided by the tensors it has, module by module. Invariant: a slot is compared with the
headers before its data are read, so that a shape is never a surprise.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from converters.checkpoint import Checkpoint, TensorInfo, open_folder
from converters.detect import QuantizationScheme, detect, find_declaration
from converters.errors import CheckpointError
from converters.files import read_json_object
from converters.formats.awq_headers import AWQHeaders
from converters.formats.base import FLOAT_DTYPES, LinearHeaders, check_tensor
from converters.formats.compressed_tensors_headers import CompressedTensorsHeaders
from converters.formats.dense_headers import DenseHeaders
from converters.formats.gptq_headers import GPTQHeaders
from converters.report import Notices, Report, shape_text
from converters.source import LinearKind, LinearSlot, Slot, TensorSlot
from quant_kernels.footprint import WeightFacts

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

#: Buffers that training code saves beside the weights. An attention mask is no bias: it has four dimensions.
_STRAY_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|masked_bias)$")
_STRAY_MASKS = re.compile(r"(^|\.)(attn|self_attn|attention)\.bias$")
#: A bias that nothing asks for is read, to see if it is zero, only up to this size.
_MAX_BIAS_BYTES = 4 * 2**20
_HEAD = "lm_head"
_HEADERS: Mapping[str, type[GPTQHeaders | AWQHeaders | CompressedTensorsHeaders]] = {
    "gptq": GPTQHeaders,
    "awq": AWQHeaders,
    "compressed-tensors": CompressedTensorsHeaders,
}


class SafetensorsHeaders:
    """See HeaderSource. `scheme` is the quantization that was found, None for a plain checkpoint."""

    def __init__(
        self, path: Path, config: Mapping[str, Any], checkpoint: Checkpoint, scheme: QuantizationScheme | None
    ) -> None:
        self.path = str(path)
        self.config = config
        self.scheme = scheme
        self.quantization: str | None = scheme.method if scheme else None
        self.description = scheme.description if scheme else _describe_plain(checkpoint)
        self._checkpoint = checkpoint
        self._formats = _formats(scheme, Notices(logger, self.path))

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read config.json and the headers.

        Raises:
            CheckpointError: if something is broken, missing or not supported.
        """
        config = read_json_object(folder / "config.json")
        declaration = find_declaration(folder, config)
        checkpoint = open_folder(folder, declaration.weight_file_stem if declaration else None)
        scheme = detect(checkpoint, declaration)
        codes = None if scheme is None else _HEADERS[scheme.method].codes
        if scheme is not None and not any(name.endswith(f".{codes}") for name in checkpoint.tensors):
            raise CheckpointError(
                f"{folder} is declared {scheme.name} but holds no quantized tensor ({codes}); "
                "if its weights are meant to be plain, remove quantization_config from config.json"
            )
        return cls(folder, config, checkpoint, scheme)

    def has_linear(self, name: str) -> bool:
        """Whether the module has weights of its own."""
        return self._format_of(name) is not None

    def check(self, slots: Sequence[Slot]) -> None:
        """Compare every slot with the headers, and every tensor with the slots.

        Raises:
            CheckpointError: with all problems at once.
        """
        report = Report(self.path)
        used: set[str] = set()
        for slot in slots:
            used.update(self._check_slot(slot, report))
        names = {slot.name for slot in slots}
        for name, info in self._checkpoint.tensors.items():
            if name not in used and not self._may_be_left_over(info, names):
                report.leftover(name, str(info))
        report.raise_if_any()

    def linear_kind(self, slot: LinearSlot) -> LinearKind:
        """By the tensors' headers, and what the quantization config says of the module.

        Raises:
            CheckpointError: if it does not fit the slot.
        """
        self._require(slot)
        infos = [self._checkpoint.tensors[name] for name in self._check_slot(slot, Report(self.path))]
        tensors = tuple((info.name.removeprefix(slot.name), info.dtype, info.shape) for info in infos)
        is_dense = isinstance(self._format_of(slot.name), DenseHeaders)
        return LinearKind(tensors, is_dense, self.scheme.for_module(slot.name) if self.scheme else None)

    def linear_facts(self, slot: LinearSlot) -> WeightFacts:
        """What the linear will be read as.

        Raises:
            CheckpointError: if it does not fit the slot.
        """
        self._require(slot)
        headers = self._format_of(slot.name)
        assert headers is not None, "a linear without a format does not pass the check"
        return headers.facts(slot, self._checkpoint.tensors)

    def _require(self, slot: Slot) -> None:
        report = Report(self.path)
        self._check_slot(slot, report)
        report.raise_if_any()

    def _format_of(self, name: str) -> LinearHeaders | None:
        return next((reader for reader in self._formats if reader.claims(name, self._checkpoint.tensors)), None)

    def _check_slot(self, slot: Slot, report: Report) -> Sequence[str]:
        tensors = self._checkpoint.tensors
        if isinstance(slot, TensorSlot):
            info = tensors.get(slot.name)
            if info is None:
                report.missing(slot.name, shape_text("F16", slot.shape))
                return []
            check_tensor(report, info, slot.shape, FLOAT_DTYPES)
            return [slot.name]
        reader = self._format_of(slot.name)
        if reader is None:
            report.missing(self._weight_name(slot.name), f"of {slot.in_features} inputs, {slot.out_features} outputs")
            return []
        return reader.check(slot, tensors, report)

    def _weight_name(self, module: str) -> str:
        """What a module without any weight should have had."""
        if self.scheme is None or self.scheme.for_module(module).skipped:
            return f"{module}.weight"
        return f"{module}.{_HEADERS[self.scheme.method].codes} (or .weight)"

    def _may_be_left_over(self, info: TensorInfo, slot_names: set[str]) -> bool:
        name = info.name
        if _STRAY_BUFFERS.search(name) or (_STRAY_MASKS.search(name) and len(info.shape) > 1):
            return True
        if name.startswith(_HEAD + ".") and _HEAD not in slot_names:
            return True
        is_small_bias = name.endswith(".bias") and info.dtype in FLOAT_DTYPES and info.num_bytes <= _MAX_BIAS_BYTES
        return is_small_bias and not _has_values(info)


def _formats(scheme: QuantizationScheme | None, notices: Notices) -> tuple[LinearHeaders, ...]:
    """Formats in the order in which they are asked whether a module is theirs."""
    if scheme is None:
        return (DenseHeaders(),)
    return (_HEADERS[scheme.method](scheme, notices), DenseHeaders())


def _has_values(info: TensorInfo) -> bool:
    """Whether a small float tensor holds anything but zeros, of either sign."""
    words = info.file.read(info.offset, info.num_bytes).view(np.uint32 if info.dtype == "F32" else np.uint16)
    return bool((words << 1).any())


def _describe_plain(checkpoint: Checkpoint) -> str:
    num_bytes: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        num_bytes[info.dtype] = num_bytes.get(info.dtype, 0) + info.num_bytes
    return f"unquantized {max(num_bytes, key=lambda dtype: num_bytes[dtype])}" if num_bytes else "empty"
