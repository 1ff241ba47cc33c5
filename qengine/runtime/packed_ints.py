"""Many small integer arrays in one buffer, so that a step's inputs reach the device in one copy.

Arrays lie side by side, each at a multiple of 16 bytes, which is what kernels are compiled to expect. Invariant: the
host's buffer is pinned where there is a GPU, and nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Ints = npt.NDArray[np.int64]
#: int32 numbers in 16 bytes.
_ALIGNMENT = 4


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each array begins, and how many numbers it may hold."""

    places: Mapping[str, tuple[int, int]]
    total: int

    @classmethod
    def of(cls, lengths: Mapping[str, int]) -> Layout:
        """Arrays of these lengths, in this order."""
        places = {}
        total = 0
        for name, length in lengths.items():
            places[name] = (total, length)
            total += -(-length // _ALIGNMENT) * _ALIGNMENT
        return cls(places, total)

    def view(self, buffer: torch.Tensor, name: str) -> torch.Tensor:
        """One array of a buffer laid out like this."""
        first, length = self.places[name]
        return buffer[first : first + length]


def write(layout: Layout, arrays: Mapping[str, Ints], *, pinned: bool) -> torch.Tensor:
    """int32 host buffer with the arrays in it, up to the end of the last one; what they leave free is undefined.

    Args:
        arrays: at most as long as their places, the last in the layout's order last.
    """
    last = max(layout.places[name][0] + array.size for name, array in arrays.items())
    buffer = torch.empty(-(-last // _ALIGNMENT) * _ALIGNMENT, dtype=torch.int32, pin_memory=pinned)
    numbers = buffer.numpy()
    for name, array in arrays.items():
        first, length = layout.places[name]
        assert array.size <= length, f"{array.size} numbers do not fit the {length} of {name}"
        numbers[first : first + array.size] = array.reshape(-1)
    return buffer
