"""The KV cache's memory: one allocation for keys, one for values, one for scales, each split per layer.

Layouts are those of `quant_kernels.attention.kv_format`. Invariant: it starts as zeros and is never handed out
uninitialized, since attention multiplies even masked slots by zero and NaN would survive that. Which block belongs to
whom is the scheduler's business.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Sequence
from math import prod

import numpy as np
import torch

from qengine.config import ModelConfig
from quant_kernels.attention.kv_format import KVFormat, LayerCache, cache_shapes
from quant_kernels.footprint import gathered_bytes_per_token


class KVCache:
    """Keys and values of every layer for `num_blocks` blocks of `block_size` tokens."""

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, kv_format: KVFormat, device: torch.device
    ) -> None:
        shapes = cache_shapes(kv_format, num_blocks, block_size, config.num_kv_heads, config.head_dim)
        self._parts = [_zeros((config.num_layers, *shape), dtype, device) for shape, dtype in shapes]
        self.format = kv_format
        self.num_blocks = num_blocks
        self.block_size = block_size
        #: Of one layer; see `footprint`.
        self.gathered_bytes_per_token = gathered_bytes_per_token(
            config.num_kv_heads, config.head_dim, 1 if kv_format.dtype is None else kv_format.dtype.itemsize
        )
        self.layers = [LayerCache(kv_format, *parts) for parts in zip(*self._parts, strict=True)]

    @property
    def device(self) -> torch.device:
        return self._parts[0].device

    @property
    def num_bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self._parts)

    def clear(self, block_ids: Collection[int]) -> None:
        """Zero the given blocks in every layer."""
        ids = torch.tensor(sorted(block_ids), dtype=torch.int64, device=self.device)
        for part in self._parts:
            part.index_fill_(1, ids, 0)

    def clear_not_finite(self, block_ids: Sequence[int]) -> None:
        """Zero those of the given blocks that hold NaN or infinity, in every layer; bytes show it by their scales.

        Sound blocks stay: they may be a prefix that other sequences share.
        """
        ids = torch.tensor(tuple(block_ids), dtype=torch.int64, device=self.device)
        bad = torch.zeros(len(ids), dtype=torch.bool, device=self.device)
        numbers = [part for part in self._parts if part.is_floating_point()]
        # A layer at a time, since a long sequence's blocks are copied to be looked at.
        for layer in (layer for part in numbers for layer in part):
            bad |= ~layer.index_select(0, ids).isfinite().flatten(1).all(dim=1)
        ids = ids[bad]
        for part in self._parts:
            part.index_fill_(1, ids, 0)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on a CPU in pages that the system provides when they are first written.

    torch.zeros would write them all at once, which costs start-up time and memory for blocks that may never be used.
    numpy.zeros asks for huge pages: then the first token of each layer writes 4 MB of zeros, and may wait until the
    system has made room for them.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = prod(shape) * dtype.itemsize
    pages = mmap.mmap(-1, max(1, num_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.from_numpy(np.frombuffer(pages, np.uint8, num_bytes)).view(dtype).view(shape)
