"""TPGroup: this rank among the ranks that share every layer, as layers see it.

Each rank has a part of the heads, of the intermediate columns and of the vocabulary, as a `TPSplit` says; a `Transport`
carries what they must tell each other. A single rank needs neither: `TPGroup.single()` lets any layer be built and
tested alone, and costs nothing. Invariant: what these methods return has the same bits on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from qengine.config import ModelConfig
from qengine.parallel.split import RankShape, TPSplit, split_model
from qengine.parallel.transport import SingleTransport, Transport


@dataclass(frozen=True, slots=True)
class TPGroup:
    """This rank's place among the ranks that share each layer. `split` None: everything is this rank's."""

    transport: Transport = field(default_factory=SingleTransport)
    split: TPSplit | None = None

    def __post_init__(self) -> None:
        num_parts = 1 if self.split is None else len(self.split.ranks)
        assert num_parts == self.size, f"a model split in {num_parts} for {self.size} ranks"

    @staticmethod
    def single() -> TPGroup:
        return TPGroup()

    @property
    def rank(self) -> int:
        return self.transport.rank

    @property
    def size(self) -> int:
        return self.transport.size

    def shape(self, config: ModelConfig) -> RankShape:
        """What this rank owns of a model."""
        split = self.split or split_model(config, 1)
        return split.ranks[self.rank]

    def add_up(self, sums: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Partial sums [S, rows, features] of this rank to those of all ranks.

        One rank leaves them as they are, for whoever reads them. Several must agree on a form, whatever their kernels
        split: [1, rows, features] in `dtype`, in which a single rank's unsplit sum would be too. It halves the bytes
        that cards hand each other, against float32.
        """
        if self.size == 1:
            return sums
        total = sums[0] if len(sums) == 1 else sums.sum(0)
        return self.transport.all_reduce(total.to(dtype).contiguous()).unsqueeze(0)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of x of any shape; x is overwritten and returned."""
        return self.transport.all_reduce(x)

    def gather_vocab(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [rows, this rank's part] of every rank, side by side: [rows, vocab]."""
        return logits if self.split is None else self.transport.all_gather(logits, self.split.vocab_sizes)
