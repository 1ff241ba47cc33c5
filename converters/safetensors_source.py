"""SafetensorsSource: a folder of safetensors as a WeightSource, quantized or not.

Whether a linear is quantized is decided by the tensors it has, module by module. Invariant: a slot is compared with the
headers before its data are read, so that a shape is never a surprise.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from converters.checkpoint import Checkpoint
from converters.detect import QuantizationScheme
from converters.formats.awq import AWQFormat
from converters.formats.base import LinearFormat
from converters.formats.compressed_tensors import CompressedTensorsFormat
from converters.formats.dense import DenseFormat
from converters.formats.gptq import GPTQFormat
from converters.read_ahead import ByteRange, Reader
from converters.report import Notices, Report
from converters.safetensors_headers import SafetensorsHeaders
from converters.source import LinearSlot, Slot, TensorSlot, Weight
from converters.tensors import ReadableCheckpoint

logger = logging.getLogger(__name__)

_FORMATS: Mapping[str, Callable[[QuantizationScheme, Notices], LinearFormat]] = {
    "gptq": GPTQFormat,
    "awq": AWQFormat,
    "compressed-tensors": CompressedTensorsFormat,
}


class SafetensorsSource(SafetensorsHeaders):
    """See WeightSource."""

    def __init__(
        self, path: Path, config: Mapping[str, Any], checkpoint: Checkpoint, scheme: QuantizationScheme | None
    ) -> None:
        super().__init__(path, config, checkpoint, scheme)
        self._tensors = ReadableCheckpoint.of(checkpoint)
        self._readers = _readers(scheme, Notices(logger, self.path))

    def ranges(self, slot: Slot) -> Sequence[ByteRange]:
        """See WeightSource."""
        return self._tensors.ranges(self._check_slot(slot, Report(self.path)))

    def read_through(self, reader: Reader) -> SafetensorsSource:
        """See WeightSource."""
        other = copy.copy(self)
        other._tensors = replace(self._tensors, reader=reader)
        return other

    def read_tensor(self, slot: TensorSlot) -> torch.Tensor:
        """The tensor in the file's dtype.

        Raises:
            CheckpointError: if it does not fit the slot, or cannot be read.
        """
        self._require(slot)
        return self._tensors.read(slot.name)

    def read_linear(self, slot: LinearSlot) -> Weight:
        """The linear as a record, or dense if that is how it is stored.

        Raises:
            CheckpointError: if it does not fit the slot, cannot be read, or holds scales that are not finite.
        """
        self._require(slot)
        tensors = self._tensors.tensors
        reader = next((reader for reader in self._readers if reader.claims(slot.name, tensors)), None)
        assert reader is not None, "a linear without a format does not pass the check"
        return reader.read(slot, self._tensors)


def _readers(scheme: QuantizationScheme | None, notices: Notices) -> tuple[LinearFormat, ...]:
    """Readers in the order in which they are asked whether a module is theirs."""
    if scheme is None:
        return (DenseFormat(),)
    return (_FORMATS[scheme.method](scheme, notices), DenseFormat())
