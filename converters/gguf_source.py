"""GGUFSource: a GGUF file as a WeightSource, under transformers' names.

llama.cpp stores the rows of q and k of some architectures in the order of its own rope, which turns neighbouring pairs;
they are put back into the half-split order by moving whole rows. Invariant: a slot is compared with the tensor table
before its data are read.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch

from converters.formats.gguf import ranges, read_linear, read_tensor
from converters.gguf_headers import HEAD_COUNTS, GGUFHeaders, gguf_name, tensor_name
from converters.read_ahead import ByteRange, DirectReader, Reader
from converters.report import Report
from converters.source import LinearSlot, Slot, TensorSlot, Weight

#: Architectures whose q and k are stored in pair order.
_PAIR_ORDER = ("llama", "mistral")


class GGUFSource(GGUFHeaders):
    """See WeightSource."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._reader: Reader = DirectReader()

    def ranges(self, slot: Slot) -> Sequence[ByteRange]:
        """See WeightSource."""
        found = (self._tensors.get(name) for name in self._check_slot(slot, Report(self.path)))
        return [part for tensor in found if tensor is not None for part in ranges(tensor)]

    def read_through(self, reader: Reader) -> GGUFSource:
        """See WeightSource."""
        other = copy.copy(self)
        other._reader = reader
        return other

    def read_tensor(self, slot: TensorSlot) -> torch.Tensor:
        """The tensor in the file's float dtype, or expanded to float32.

        Raises:
            CheckpointError: if it does not fit the slot, cannot be read, or holds scales that are not finite.
        """
        self._require(slot)
        return read_tensor(self._tensors[tensor_name(slot)], self._reader)

    def read_linear(self, slot: LinearSlot) -> Weight:
        """The linear as a record, or dense if that is how it is stored.

        Raises:
            CheckpointError: if it does not fit the slot, cannot be read, or holds scales that are not finite.
        """
        self._require(slot)
        name = gguf_name(slot.name)
        order = self._row_order(slot)
        bias = self._tensors.get(f"{name}.bias")
        values = None if bias is None else read_tensor(bias, self._reader)
        if values is not None and not slot.has_bias and not bool(values.any()):
            values = None
        if values is not None and order is not None:
            values = values[order]
        return read_linear(self._tensors[f"{name}.weight"], order, values, self._reader)

    def _row_order(self, slot: LinearSlot) -> torch.Tensor | None:
        """For each output in half-split order the stored row that holds it; None where they are stored in that order.

        A head of 2h rows is stored as pairs, 0, h, 1, h + 1, ...
        """
        count = HEAD_COUNTS.get(slot.name.rpartition(".")[2])
        if count is None or self.config["model_type"] not in _PAIR_ORDER:
            return None
        half = self.config["head_dim"] // 2
        return torch.arange(slot.out_features).view(self.config[count], half, 2).transpose(1, 2).reshape(-1)
