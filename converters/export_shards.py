"""Shards: tensors that arrive one after the other, in files of bounded size under transformers' names.

Invariant: no more than one file's bytes are kept in memory; a checkpoint that fits one file is ``model.safetensors``,
else an index says where each tensor is.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from converters.export_folder import OutputFolder

_ONE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class ShardWriter:
    """Collects tensors; `finish` writes what is left and the index.

    Args:
        max_bytes: of one file, unless a single tensor is larger.
        metadata: of every file's header.
    """

    def __init__(self, folder: OutputFolder, max_bytes: int, metadata: Mapping[str, str]) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._metadata = metadata
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._files: list[tuple[str, list[str]]] = []
        self.num_bytes = 0

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take tensors. Raises WriteError."""
        for name, tensor in tensors.items():
            num_bytes = tensor.numel() * tensor.element_size()
            if self._pending and self._pending_bytes + num_bytes > self._max_bytes:
                self._flush()
            self._pending[name] = tensor
            self._pending_bytes += num_bytes
            self.num_bytes += num_bytes

    def finish(self) -> None:
        """Write what is left, and give the files their names. Raises WriteError."""
        if self._pending:
            self._flush()
        if len(self._files) == 1:
            self._folder.rename(self._files[0][0], _ONE)
            return
        places: dict[str, str] = {}
        for number, (temporary, names) in enumerate(self._files, start=1):
            final = f"model-{number:05d}-of-{len(self._files):05d}.safetensors"
            self._folder.rename(temporary, final)
            places.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self.num_bytes}, "weight_map": dict(sorted(places.items()))}
        self._folder.write_json(_INDEX, index)

    def _flush(self) -> None:
        name = f"part-{len(self._files) + 1:05d}.safetensors"
        self._folder.write_tensors(name, self._pending, self._metadata)
        self._files.append((name, list(self._pending)))
        self._pending, self._pending_bytes = {}, 0
