"""GGUFSource: a GGUF file as a WeightSource, under transformers' names.

Invariant: see `source.WeightSource`. `metadata` is the file's own, from which tokenizers are made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from converters.errors import CheckpointError
from converters.formats import gguf
from converters.gguf_file import GGUFTensor, open_gguf
from converters.problems import Problems
from converters.source import LinearSlot, Slot, TensorSlot, Weight

#: Tensors that are read as part of the configuration.
_CONSUMED = ("rope_freqs.weight",)


class GGUFSource:
    """An opened GGUF file.

    Raises:
        CheckpointError: if the file is malformed or its architecture unsupported.
    """

    quantization: str | None = "gguf"

    def __init__(self, path: Path) -> None:
        file = open_gguf(path)
        self.path = str(path)
        self.metadata: Mapping[str, Any] = file.metadata
        self._tensors = file.tensors
        self.config: Mapping[str, Any] = gguf.model_config(file.metadata, file.tensors, str(path))
        kinds = Counter(t.type.name for t in file.tensors.values() if len(t.shape) > 1)
        self.description = "GGUF " + ", ".join(f"{kind} x{count}" for kind, count in kinds.most_common())

    def has_linear(self, name: str) -> bool:
        """Whether the file has weights for module `name`."""
        return gguf.gguf_name(name) + ".weight" in self._tensors

    def check(self, slots: Sequence[Slot]) -> None:
        """Compare the tensor table with what the model needs; see `source.WeightSource.check`."""
        problems = Problems(self.path)
        used = set(_CONSUMED)
        for slot in slots:
            if isinstance(slot, TensorSlot):
                used.add(self._check_tensor(self._tensor_name(slot), slot.shape, problems))
            else:
                used |= self._check_linear(slot, problems)
        problems.leftover(set(self._tensors) - used)
        problems.raise_if_any()

    def read_tensor(self, slot: TensorSlot) -> torch.Tensor:
        """See `source.WeightSource.read_tensor`."""
        return gguf.read_tensor(self._tensors[self._tensor_name(slot)])

    def read_linear(self, slot: LinearSlot) -> Weight:
        """See `source.WeightSource.read_linear`."""
        name = gguf.gguf_name(slot.name)
        rows = None
        if gguf.is_interleaved(slot.name, self.config["model_type"]):
            key = "num_attention_heads" if slot.name.endswith("q_proj") else "num_key_value_heads"
            heads = self.config[key] or self.config["num_attention_heads"]
            rows = gguf.half_split_rows(slot.out_features, heads)
        bias = self._tensors.get(name + ".bias")
        values = None if bias is None else gguf.read_tensor(bias)
        if values is not None and not slot.has_bias and not bool(values.any()):
            values = None
        if values is not None and rows is not None:
            values = values[torch.from_numpy(rows)]
        return gguf.read_linear(self._tensors[name + ".weight"], rows, values)

    @staticmethod
    def _tensor_name(slot: TensorSlot) -> str:
        module, _, kind = slot.name.rpartition(".")
        return f"{gguf.gguf_name(module)}.{kind}"

    def _check_tensor(self, name: str, shape: tuple[int, ...], problems: Problems) -> str:
        tensor = self._tensors.get(name)
        if tensor is None:
            problems.missing(name)
        elif tensor.shape != shape:
            problems.misshaped(name, tensor.shape, shape)
        else:
            self._check_type(tensor, problems)
        return name

    def _check_type(self, tensor: GGUFTensor, problems: Problems) -> None:
        if tensor.type.name not in gguf.SUPPORTED_TYPES:
            supported = ", ".join(gguf.SUPPORTED_TYPES)
            problems.unsupported(f"{tensor.name} is {tensor.type.name}; supported block types are {supported}")

    def _check_linear(self, slot: LinearSlot, problems: Problems) -> set[str]:
        name = gguf.gguf_name(slot.name)
        self._check_tensor(name + ".weight", (slot.out_features, slot.in_features), problems)
        bias = self._tensors.get(name + ".bias")
        if bias is not None:
            self._check_tensor(name + ".bias", (slot.out_features,), problems)
        elif slot.has_bias:
            problems.missing(name + ".bias")
        return {name + ".weight", name + ".bias"}


def find_gguf(folder: Path) -> Path | None:
    """The one GGUF model of a folder, the first part of a split one; None if it has none.

    Raises:
        CheckpointError: if it has several models.
    """
    files = sorted(folder.glob("*.gguf"))
    first_parts = [f for f in files if "-of-" not in f.name or "-00001-of-" in f.name]
    if len(first_parts) > 1:
        names = ", ".join(f.name for f in first_parts[:4])
        raise CheckpointError(f"{folder} has {len(first_parts)} GGUF models ({names}); name the one to load")
    return first_parts[0] if first_parts else None
