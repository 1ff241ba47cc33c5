"""From a Batch to the tensors of one step: the record that the runner works with, and the CPU's way to it.

Rows are tokens. Invariant: row order is decided here alone (`device_inputs` for a GPU), and `sample_rows` /
`sample_entries` map results back to requests. It runs no model code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from qengine.layers.rope import RotaryEmbedding
from qengine.runtime.kv_cache import KVCache
from qengine.scheduling.batch import Batch, BatchEntry
from quant_kernels.attention.gathered import make_segments
from quant_kernels.footprint import GATHER_BYTES
from quant_kernels.ops.base import StepInputs
from quant_kernels.ops.torch_ops import TorchInputs
from quant_kernels.stack import NativeInputs


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """A step's inputs.

    Attributes:
        token_ids: int [rows].
        entries: in row order.
        first_rows: the row of each entry's first token.
        sample_rows: int [entries that sample], the row of each one's last token.
    """

    token_ids: torch.Tensor
    inputs: StepInputs
    entries: tuple[BatchEntry, ...]
    first_rows: tuple[int, ...]
    sample_rows: torch.Tensor

    @property
    def sample_entries(self) -> list[BatchEntry]:
        return [e for e in self.entries if e.sample is not None]


class Steps(Protocol):
    """Prepares steps for a device."""

    def prepare(self, batch: Batch) -> PreparedStep:
        """Lay the batch's tokens out as rows, and say where each one stands."""
        ...


class CpuSteps:
    """Steps for torch's operations on a cache. Sequences with one token come first (see `make_segments`)."""

    def __init__(self, rope: RotaryEmbedding, cache: KVCache, dtype: torch.dtype) -> None:
        self._rope = rope
        self._block_size = cache.block_size
        self._max_gathered = GATHER_BYTES // cache.gathered_bytes_per_token
        self._dtype = dtype

    def prepare(self, batch: Batch) -> PreparedStep:
        spans = [(e.start, e.num_tokens, e.block_ids) for e in batch.entries]
        segments, order = make_segments(spans, self._block_size, self._max_gathered)
        entries = tuple(batch.entries[i] for i in order)
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for entry in entries:
            token_ids.extend(entry.token_ids)
            positions.extend(range(entry.start, entry.context_len))
            slots.extend(_slots(entry.block_ids, entry.start, entry.context_len, self._block_size))
        cos, sin = self._rope.at(torch.tensor(positions), self._dtype)
        inputs = TorchInputs(torch.tensor(slots), cos, sin, segments)
        rows = torch.tensor(sample_rows(entries), dtype=torch.int64)
        return PreparedStep(torch.tensor(token_ids), inputs, entries, first_rows(entries), rows)


class StackSteps:
    """Steps for a stack of layers that is one call. Rows are in the batch's order.

    Attributes:
        by_layer: makes steps for the same layers one by one, to look between them.
    """

    def __init__(self, by_layer: CpuSteps) -> None:
        self.by_layer = by_layer

    def prepare(self, batch: Batch) -> PreparedStep:
        entries = batch.entries
        inputs = NativeInputs.of([(e.start, e.num_tokens, e.block_ids) for e in entries])
        token_ids = torch.tensor([token for e in entries for token in e.token_ids])
        rows = torch.tensor(sample_rows(entries), dtype=torch.int64)
        return PreparedStep(token_ids, inputs, entries, first_rows(entries), rows)


def first_rows(entries: Sequence[BatchEntry]) -> tuple[int, ...]:
    """The row of each entry's first token."""
    rows, row = [], 0
    for entry in entries:
        rows.append(row)
        row += entry.num_tokens
    return tuple(rows)


def sample_rows(entries: Sequence[BatchEntry]) -> list[int]:
    """The row of the last token of each entry that samples."""
    firsts = first_rows(entries)
    return [row + e.num_tokens - 1 for e, row in zip(entries, firsts, strict=True) if e.sample is not None]


def _slots(block_ids: Sequence[int], start: int, end: int, block_size: int) -> list[int]:
    return [block_ids[p // block_size] * block_size + p % block_size for p in range(start, end)]
