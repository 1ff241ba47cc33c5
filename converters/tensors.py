"""The tensors of safetensors files, read by name.

Invariant: a tensor comes as its header describes it, in the file's dtype, on the CPU. It converts nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from converters.checkpoint import Checkpoint, TensorInfo
from converters.errors import CheckpointError
from converters.files import shown
from converters.read_ahead import ByteRange, DirectReader, Reader

_TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class ReadableCheckpoint(Checkpoint):
    """A checkpoint whose tensors can be read, through `reader`."""

    reader: Reader = field(default_factory=DirectReader)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> ReadableCheckpoint:
        """The same checkpoint, to be read."""
        return cls(checkpoint.path, checkpoint.tensors, checkpoint.metadata)

    def read(self, name: str) -> torch.Tensor:
        """The tensor on the CPU, in the file's dtype.

        Raises:
            CheckpointError: if the dtype has no counterpart here, or the file cannot be read any more.
        """
        info = self.tensors[name]
        dtype = _TORCH.get(info.dtype)
        if dtype is None:
            raise CheckpointError(f"{info.file.path}: {shown(name)} has dtype {info.dtype}, which is not supported")
        return torch.from_numpy(self.reader.read(_range(info))).view(dtype).reshape(info.shape)

    def ranges(self, names: Iterable[str]) -> list[ByteRange]:
        """Where the tensors lie, in the order of their files."""
        return sorted((_range(self.tensors[name]) for name in names), key=lambda r: (str(r.file.path), r.offset))


def _range(info: TensorInfo) -> ByteRange:
    return ByteRange(info.file, info.offset, info.num_bytes)
