"""Buffers: memory for file data that is used again as soon as nobody refers to it.

The first touch of fresh memory costs more than copying a file's cached pages into it, and a model asks for the same
sizes layer after layer. Invariant: a buffer comes back only when every array, tensor and view made of it is gone; what
keeps its data keeps its memory. It counts no bytes that are in use.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque

import numpy as np

from converters.files import Bytes

#: Smaller ones come from the allocator, which uses them again itself.
_LEAST_BYTES = 2**20


class Buffers:
    """A pool by exact size. Buffers come back from whatever thread drops them last."""

    def __init__(self) -> None:
        self._free: dict[int, deque[mmap.mmap]] = {}

    @property
    def free_bytes(self) -> int:
        """Of buffers that wait to be used again."""
        return sum(num_bytes * len(free) for num_bytes, free in self._free.items())

    def take(self, num_bytes: int) -> Bytes:
        """uint8 [num_bytes] of any content."""
        if num_bytes < _LEAST_BYTES:
            return np.empty(num_bytes, dtype=np.uint8)
        free = self._free.setdefault(num_bytes, deque())
        # Only finalizers run beside this, and they only append.
        memory = free.pop() if free else _fresh(num_bytes)
        # Views refer to this array and not to the memory below it, since that is no array.
        data: Bytes = np.frombuffer(memory, dtype=np.uint8)
        weakref.finalize(data, free.append, memory).atexit = False
        return data

    def trim(self, max_bytes: int) -> None:
        """Give memory back until no more than `max_bytes` wait."""
        for free in self._free.values():
            while free and self.free_bytes > max_bytes:
                free.pop()

    def clear(self) -> None:
        """Give all of it back; what is in use goes when it is dropped."""
        self._free.clear()


def _fresh(num_bytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
