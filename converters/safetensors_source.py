"""SafetensorsSource: a folder of safetensors, plain, GPTQ or AWQ, as a WeightSource.

Invariant: see `source.WeightSource`. Whether a linear is quantized is decided by the tensors it has, never by the
configuration's lists.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from converters.checkpoint import Checkpoint
from converters.detect import AWQ, QuantizationScheme, detect, find_config
from converters.errors import CheckpointError
from converters.formats import awq, gptq
from converters.json_files import read_json_object
from converters.problems import Problems
from converters.source import LinearSlot, Slot, TensorSlot, Weight
from quant_kernels.packed_weight import DenseWeight

logger = logging.getLogger(__name__)

_FLOATS = ("F16", "BF16", "F32", "F64")
#: Buffers that older writers saved and nobody needs.
_STRAY = re.compile(r".*(rotary_emb\.inv_freq|masked_bias|attn\.bias|rotary_emb\.(cos|sin)_cached)")
_QUANTIZED_PARTS = ("qweight", "qzeros", "scales", "g_idx")


class SafetensorsSource:
    """An opened folder.

    Raises:
        CheckpointError: if a file is malformed or its quantization unsupported.
    """

    def __init__(self, folder: Path) -> None:
        self.path = str(folder)
        self.config: Mapping[str, Any] = read_json_object(folder / "config.json")
        self._checkpoint = Checkpoint(folder, _file_stem(folder, self.config))
        declared = find_config(folder, self.config, self._checkpoint.metadata)
        self._scheme = detect(declared, self._checkpoint.tensors, self.path)
        has_packed = any(name.endswith(".qweight") for name in self._checkpoint.tensors)
        if self._scheme is not None and not has_packed:
            raise CheckpointError(
                f"{folder} is declared {self._scheme.method.upper()} but holds no quantized tensor (qweight); "
                "remove quantization_config from config.json if the weights are plain"
            )
        self.quantization: str | None = self._scheme.method if self._scheme else None
        self.description = self._scheme.summary if self._scheme else "not quantized"
        self._warned: set[str] = set()

    def has_linear(self, name: str) -> bool:
        """Whether the folder has weights for module `name`, dense or quantized."""
        return f"{name}.weight" in self._checkpoint or f"{name}.qweight" in self._checkpoint

    # Headers

    def check(self, slots: Sequence[Slot]) -> None:
        """Compare the headers with what the model needs; see `source.WeightSource.check`."""
        problems = Problems(self.path)
        used: set[str] = set()
        for slot in slots:
            if isinstance(slot, TensorSlot):
                self._expect(slot.name, slot.shape, _FLOATS, problems)
                used.add(slot.name)
            elif f"{slot.name}.qweight" in self._checkpoint:
                self._check_quantized(slot, problems)
                used |= {f"{slot.name}.{part}" for part in (*_QUANTIZED_PARTS, "bias")}
            else:
                self._expect(f"{slot.name}.weight", (slot.out_features, slot.in_features), _FLOATS, problems)
                self._check_bias(slot, problems)
                used |= {f"{slot.name}.weight", f"{slot.name}.bias"}
        left = set(self._checkpoint.tensors) - used
        problems.leftover(name for name in left if not _STRAY.fullmatch(name))
        problems.raise_if_any()

    def _expect(self, name: str, shape: tuple[int, ...], dtypes: Sequence[str], problems: Problems) -> bool:
        if name not in self._checkpoint:
            problems.missing(name)
            return False
        info = self._checkpoint.info(name)
        if info.shape != shape:
            problems.misshaped(name, info.shape, shape)
            return False
        if info.dtype not in dtypes:
            problems.unsupported(f"{name} is {info.dtype}, expected {' or '.join(dtypes)}")
            return False
        return True

    def _check_bias(self, slot: LinearSlot, problems: Problems) -> None:
        name = f"{slot.name}.bias"
        if slot.has_bias or name in self._checkpoint:
            self._expect(name, (slot.out_features,), _FLOATS, problems)

    def _check_quantized(self, slot: LinearSlot, problems: Problems) -> None:
        self._check_bias(slot, problems)
        scales = f"{slot.name}.scales"
        if scales not in self._checkpoint:
            problems.missing(scales)
            return
        shape = self._checkpoint.info(scales).shape
        if len(shape) != 2 or shape[0] < 1:
            problems.misshaped(scales, shape, f"[groups, {slot.out_features}]")
            return
        self._expect(scales, (shape[0], slot.out_features), _FLOATS, problems)
        if self.quantization == AWQ:
            self._check_awq(slot, shape[0], problems)
        else:
            self._check_gptq(slot, shape[0], problems)

    def _check_awq(self, slot: LinearSlot, num_groups: int, problems: Problems) -> None:
        rows, columns = slot.in_features, slot.out_features
        if columns % 8 or rows % 8:
            problems.unsupported(f"{slot.name}: {rows} x {columns} does not fill words of eight codes")
            return
        if rows % num_groups:
            problems.misshaped(f"{slot.name}.scales", (num_groups, columns), f"groups that divide {rows} inputs")
        self._expect(f"{slot.name}.qweight", (rows, columns // 8), ("I32",), problems)
        if f"{slot.name}.qzeros" in self._checkpoint:
            self._expect(f"{slot.name}.qzeros", (num_groups, columns // 8), ("I32",), problems)

    def _check_gptq(self, slot: LinearSlot, num_groups: int, problems: Problems) -> None:
        rows, columns = slot.in_features, slot.out_features
        name = f"{slot.name}.qweight"
        shape = self._checkpoint.info(name).shape
        bits = gptq.bits_from_shape(shape[0], rows) if len(shape) == 2 else None
        if bits is None or rows % 32:
            problems.misshaped(name, shape, f"[{rows} * bits / 32, {columns}] for 2, 3, 4 or 8 bits")
            return
        self._expect(name, (shape[0], columns), ("I32",), problems)
        declared = self._module_scheme(slot.name)
        group_size = gptq.group_size_from_shape(num_groups, rows, declared.group_size)
        if group_size is None:
            problems.unsupported(f"{slot.name}: {num_groups} groups over {rows} inputs fit no known group size")
            return
        if bits != declared.bits or group_size != (rows if declared.group_size == -1 else declared.group_size):
            self._warn(slot.name, f"shapes say {bits} bits and groups of {group_size}, the configuration another")
        if columns * bits % 32:
            problems.unsupported(f"{slot.name}: {columns} outputs do not fill the words of qzeros")
        elif f"{slot.name}.qzeros" in self._checkpoint:
            self._expect(f"{slot.name}.qzeros", (num_groups, columns * bits // 32), ("I32",), problems)
        elif not declared.sym:
            problems.missing(f"{slot.name}.qzeros")
        if f"{slot.name}.g_idx" in self._checkpoint:
            self._expect(f"{slot.name}.g_idx", (rows,), ("I32", "I64"), problems)

    def _module_scheme(self, name: str) -> QuantizationScheme:
        """The scheme of a module that is quantized, whatever the skip lists say of it."""
        assert self._scheme is not None, "only quantized folders have qweight"
        return self._scheme.for_module(name) or self._scheme

    # Data

    def read_tensor(self, slot: TensorSlot) -> torch.Tensor:
        """See `source.WeightSource.read_tensor`."""
        return self._checkpoint.read(slot.name)

    def read_linear(self, slot: LinearSlot) -> Weight:
        """See `source.WeightSource.read_linear`."""
        name = slot.name
        bias = self._read_bias(slot)
        if f"{name}.qweight" not in self._checkpoint:
            return DenseWeight(self._checkpoint.read(f"{name}.weight"), bias)
        qweight, scales = self._checkpoint.read(f"{name}.qweight"), self._checkpoint.read(f"{name}.scales")
        qzeros, g_idx = self._read_optional(f"{name}.qzeros"), self._read_optional(f"{name}.g_idx")
        if self.quantization == AWQ:
            return awq.convert(name, awq.AWQTensors(qweight, scales, qzeros, bias), slot.in_features)
        tensors = gptq.GPTQTensors(qweight, scales, qzeros, g_idx, bias)
        weight, warnings = gptq.convert(name, tensors, slot.in_features, self._module_scheme(name))
        for warning in warnings:
            self._warn(name, warning)
        return weight

    def _read_optional(self, name: str) -> torch.Tensor | None:
        return self._checkpoint.read(name) if name in self._checkpoint else None

    def _read_bias(self, slot: LinearSlot) -> torch.Tensor | None:
        """The bias; one that the architecture does not have counts only if it is not all zero."""
        bias = self._read_optional(f"{slot.name}.bias")
        if bias is not None and not slot.has_bias and not bool(bias.any()):
            return None
        return bias

    def _warn(self, name: str, message: str) -> None:
        """Each kind of oddity is told once per checkpoint, with the first module that has it."""
        if message not in self._warned:
            self._warned.add(message)
            logger.warning("%s: %s (first in %s)", self.path, message, name)


def _file_stem(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The weight file that AutoGPTQ's configuration names, without its suffix."""
    for raw in (config.get("quantization_config"), _optional_object(folder / "quantize_config.json")):
        stem = raw.get("model_file_base_name") if isinstance(raw, Mapping) else None
        if isinstance(stem, str) and stem:
            return stem
    return None


def _optional_object(path: Path) -> Mapping[str, Any] | None:
    return read_json_object(path) if path.is_file() else None
