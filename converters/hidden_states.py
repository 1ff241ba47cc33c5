"""Hidden states of a calibration, on disk: one file for each layer, read and written batch by batch.

They always lie in files: the system keeps in memory what fits, a model of any size needs no more of its own, and a
program that is killed finds them again. Invariant: a batch comes back bit for bit, float32.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from converters.errors import CheckpointError
from converters.safetensors_writer import write_error

_BYTES = 4


class HiddenStates:
    """The hidden states at one layer.

    Args:
        sizes: sequences and tokens of each batch.
        width: of the model.

    Raises:
        WriteError: if the file cannot be opened.
    """

    def __init__(self, path: Path, sizes: Sequence[tuple[int, int]], width: int) -> None:
        self.path = path
        self._shapes = [(count, length, width) for count, length in sizes]
        lengths = [count * length * width * _BYTES for count, length in sizes]
        self._offsets = [sum(lengths[:index]) for index in range(len(lengths) + 1)]
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise write_error(path, self.num_bytes, 0, error) from error

    @property
    def num_bytes(self) -> int:
        """Of all batches."""
        return self._offsets[-1]

    def read(self, index: int) -> torch.Tensor:
        """float32 [B, T, width] on the CPU.

        Raises:
            CheckpointError: if the disk does not give back what was written.
        """
        data = np.empty(self._shapes[index], dtype=np.float32)
        view, offset = data.reshape(-1).view(np.uint8).data, self._offsets[index]
        try:
            while len(view):
                count = os.preadv(self._descriptor, [view], offset)
                if not count:
                    raise OSError(errno.EIO, "the file ends")
                view, offset = view[count:], offset + count
        except OSError as error:
            raise CheckpointError(
                f"cannot read {self.path}: {error.strerror} at byte {offset} of {self.num_bytes}; it was whole when "
                "it was written: check the disk, and begin anew"
            ) from error
        return torch.from_numpy(data)

    def write(self, index: int, values: torch.Tensor) -> None:
        """Keep a batch. Raises WriteError."""
        assert tuple(values.shape) == self._shapes[index], "a layer keeps the shape of its input"
        view = values.detach().float().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        offset = self._offsets[index]
        try:
            while len(view):
                count = os.pwrite(self._descriptor, view, offset)
                view, offset = view[count:], offset + count
        except OSError as error:
            raise write_error(self.path, self.num_bytes, offset, error) from error

    def sync(self) -> None:
        """Make what was written last. Raises WriteError."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise write_error(self.path, self.num_bytes, self.num_bytes, error) from error

    def close(self) -> None:
        """Once."""
        os.close(self._descriptor)

    def remove(self) -> None:
        """Close, and delete the file."""
        self.close()
        self.path.unlink(missing_ok=True)
