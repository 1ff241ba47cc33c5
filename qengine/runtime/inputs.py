"""From a Batch to the tensors of one step.

Rows are tokens; sequences with one token come first (see `make_segments`). Invariant: row order is decided here alone,
and `sample_rows` / `sample_entries` map results back to requests. It runs no model code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qengine.layers.rope import RotaryEmbedding
from qengine.scheduling.batch import Batch, BatchEntry
from quant_kernels.attention.gathered import make_segments
from quant_kernels.ops.base import StepInputs
from quant_kernels.ops.torch_ops import TorchInputs


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """A step's inputs. `token_ids` int64 [rows]; entries in row order with the row of each one's first token."""

    token_ids: torch.Tensor
    inputs: StepInputs
    entries: tuple[BatchEntry, ...]
    first_rows: tuple[int, ...]

    @property
    def sample_entries(self) -> list[BatchEntry]:
        return [e for e in self.entries if e.sample is not None]

    @property
    def sample_rows(self) -> list[int]:
        """Row of the last token of each entry that samples."""
        return [
            row + e.num_tokens - 1 for e, row in zip(self.entries, self.first_rows, strict=True) if e.sample is not None
        ]


def prepare_step(batch: Batch, rope: RotaryEmbedding, block_size: int, dtype: torch.dtype) -> PreparedStep:
    """Lay the batch's tokens out as rows and work out positions, slots and attention segments."""
    spans = [(e.start, e.num_tokens, e.block_ids) for e in batch.entries]
    segments, order = make_segments(spans, block_size)
    entries = tuple(batch.entries[i] for i in order)
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    first_rows: list[int] = []
    for entry in entries:
        first_rows.append(len(token_ids))
        token_ids.extend(entry.token_ids)
        positions.extend(range(entry.start, entry.context_len))
        slots.extend(_slots(entry.block_ids, entry.start, entry.context_len, block_size))
    cos, sin = rope.at(torch.tensor(positions), dtype)
    inputs = TorchInputs(torch.tensor(slots), cos, sin, segments)
    return PreparedStep(torch.tensor(token_ids), inputs, entries, tuple(first_rows))


def _slots(block_ids: Sequence[int], start: int, end: int, block_size: int) -> list[int]:
    return [block_ids[p // block_size] * block_size + p % block_size for p in range(start, end)]
