"""Small tables to the device and results back, in copies that the host does not wait for.

Invariant: what a copy to a CUDA device reads or one from it writes is pinned memory, without which the driver would
make the host wait. Torch's allocator does not hand pinned memory out again before the copies that use it are done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

_ALIGNMENT = 16


def to_device(arrays: Sequence[np.ndarray[Any, Any]], device: torch.device) -> list[torch.Tensor]:
    """One-dimensional arrays of one dtype as tensors on the device, moved in a single copy.

    On the CPU they share the arrays' memory. On other devices each begins at a multiple of 16 bytes, which is what
    kernels are compiled for.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    padded = [np.pad(array, (0, -len(array) % (_ALIGNMENT // array.itemsize))) for array in arrays]
    joined = torch.from_numpy(np.concatenate(padded))
    if device.type == "cuda":
        joined = joined.pin_memory()
    parts = torch.split(joined.to(device, non_blocking=True), [len(array) for array in padded])
    return [part[: len(array)] for part, array in zip(parts, arrays, strict=True)]


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory, complete once the device's stream has come this far; the tensor itself if not on CUDA."""
    if tensor.device.type != "cuda":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


class Arrival:
    """The moment when everything that a device's stream has been given by now is done: copies to the host are there."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def wait(self) -> None:
        """Return once it has come; at once where nothing runs behind the host's back."""
        if self._event is not None:
            self._event.synchronize()
