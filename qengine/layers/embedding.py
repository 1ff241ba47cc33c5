"""Token embedding: a table lookup. It does not scale and does not share memory with the head unless told to."""

from __future__ import annotations

import torch


class Embedding:
    """token ids [rows] to [rows, hidden]; table [vocab, hidden] in the compute dtype."""

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table

    @property
    def num_bytes(self) -> int:
        return self.table.numel() * self.table.element_size()

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.table.index_select(0, token_ids)
