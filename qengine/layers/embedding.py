"""Token embedding: a table lookup. It does not scale and does not share memory with the head unless told to.

Several ranks have neighbouring rows of the table each. Invariant: one rank looks a token up and the others add zeros,
so the sum is the row itself, whatever the dtype.
"""

from __future__ import annotations

import torch

from qengine.parallel.group import TPGroup


class Embedding:
    """token ids [rows] to [rows, hidden]; table [this rank's part of vocab, hidden] in the compute dtype.

    Args:
        first_id: the token of the table's first row.
    """

    def __init__(self, table: torch.Tensor, first_id: int = 0, group: TPGroup | None = None) -> None:
        self.table = table
        self.first_id = first_id
        self.group = group or TPGroup.single()

    @property
    def num_bytes(self) -> int:
        return self.table.numel() * self.table.element_size()

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        if self.group.size == 1:
            return self.table.index_select(0, token_ids)
        rows = token_ids - self.first_id
        is_elsewhere = (rows < 0) | (rows >= len(self.table))
        found = self.table.index_select(0, rows.masked_fill(is_elsewhere, 0))
        return self.group.all_reduce(found.masked_fill_(is_elsewhere.unsqueeze(1), 0))
