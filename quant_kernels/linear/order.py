"""InputOrder: x in the order, and with the padding, in which a record stores its rows.

Invariant: column i of the result is column perm[i] of x, and zero where the record has a row of padding. It is for
linears that order their own inputs; where the operation before a linear can store its columns in order, nothing is
moved here (`places`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quant_kernels.packing import input_places


@dataclass(frozen=True, slots=True)
class InputOrder:
    """Attributes:
    index: int64 [rows]: the input that feeds each row; with padding [inputs]: the row that each input feeds.
    num_rows: of the record.
    """

    index: torch.Tensor
    num_rows: int

    @classmethod
    def of(cls, perm: torch.Tensor) -> InputOrder:
        """The order of a record's `perm`."""
        places = input_places(perm)
        return cls(perm.long() if len(places) == len(perm) else places, len(perm))

    @property
    def is_padded(self) -> bool:
        """Whether some rows have no input."""
        return len(self.index) < self.num_rows

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [M, inputs] to [M, rows]."""
        if not self.is_padded:
            return x.index_select(1, self.index)
        return x.new_zeros(x.shape[0], self.num_rows).index_copy_(1, self.index, x)
