"""The KV cache's memory: one allocation, split per layer.

Layout [layers, 2 (keys, values), num_blocks, block_size, num_kv_heads, head_dim]. Invariant: it starts as zeros and is
never handed out uninitialized, since attention multiplies even masked slots by zero and NaN would survive that.
Which block belongs to whom is the scheduler's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch

from qengine.config import ModelConfig
from qengine.layers.attention import LayerCache


class KVCache:
    """Keys and values of every layer for `num_blocks` blocks of `block_size` tokens."""

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_layers, 2, num_blocks, block_size, config.num_kv_heads, config.head_dim)
        self.storage = _zeros(shape, dtype, device)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.layers = [LayerCache(layer[0], layer[1]) for layer in self.storage]

    @property
    def num_bytes(self) -> int:
        return self.storage.numel() * self.storage.element_size()

    def clear_not_finite(self, block_ids: Sequence[int]) -> None:
        """Zero those of the given blocks that hold NaN or infinity, in every layer.

        Sound blocks stay: they may be a prefix that other sequences share.
        """
        for block_id in block_ids:
            block = self.storage[:, :, block_id]
            if not bool(block.isfinite().all()):
                block.zero_()


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on a CPU in pages that the system provides when they are first written.

    torch.zeros would write them all at once, which costs start-up time and memory for blocks that may never be used.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
