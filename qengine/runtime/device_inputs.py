"""From a Batch to the tensors of one step on a GPU: built with numpy, sent in one copy.

Rows are tokens, in the batch's order. Attention's work is cut here, once per distinct window of the model. The same
arrays go to fresh memory for an eager step, or to fixed places that a CUDA graph reads (`StaticInputs`), padded with
rows that store nothing and are attended by nobody. Invariant: nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from qengine.config import ModelConfig
from qengine.layers.rope import RotaryEmbedding
from qengine.runtime.inputs import PreparedStep, first_rows, sample_rows
from qengine.runtime.model_bytes import NUM_SLOTS
from qengine.runtime.packed_ints import Ints, Layout, write
from qengine.scheduling.batch import Batch, BatchEntry
from quant_kernels.attention.kv_format import KVFormat
from quant_kernels.attention.paged import Scratch, Work
from quant_kernels.attention.store import Placement
from quant_kernels.attention.work import NUM_FIELDS, Sharing, Spans, plan_items
from quant_kernels.ops.triton_ops import TritonInputs
from quant_kernels.tuning.attention import AttentionTile, most_shares, select_attention
from quant_kernels.tuning.card import Card

#: Programs per multiprocessor that a recorded attention launch has; each takes as many items as there are.
_RECORDED_PROGRAMS_PER_SM = 4
_NO_SLOT = -1
_Window = int | None


class BlockTables:
    """Block ids of the sequences that run, as arrays, so that a step converts only what is new."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[int, ...], Ints]] = {}

    def of(self, entries: Sequence[BatchEntry]) -> list[Ints]:
        """One array per entry; forgets all others."""
        known = {e.request_id: self._table(e) for e in entries}
        self._known = known
        return [known[e.request_id][1] for e in entries]

    def _table(self, entry: BatchEntry) -> tuple[tuple[int, ...], Ints]:
        ids = entry.block_ids
        old = self._known.get(entry.request_id)
        if old is None or ids[: len(old[0])] != old[0]:
            return ids, np.array(ids, dtype=np.int64)
        if len(old[0]) == len(ids):
            return old
        return ids, np.concatenate([old[1], np.array(ids[len(old[0]) :], dtype=np.int64)])


@dataclass(frozen=True, slots=True)
class StepArrays:
    """A step on the host: arrays by name, in the order of their layout, and what attention was cut for."""

    arrays: dict[str, Ints]
    tile: AttentionTile


@dataclass(frozen=True, slots=True)
class _Guess:
    """A step that is expected: every sequence one token further.

    Attributes:
        entries: as they are expected; the last block of those in `new_blocks` is not known yet.
        new_blocks: where in the flat list the block goes that an entry will be given, by its index.
    """

    entries: Sequence[BatchEntry]
    step: StepArrays
    new_blocks: Mapping[int, int]


class DeviceSteps:
    """Prepares steps for one model on one device."""

    def __init__(
        self,
        config: ModelConfig,
        rope: RotaryEmbedding,
        kv_format: KVFormat,
        block_size: int,
        card: Card,
        device: torch.device,
    ) -> None:
        self.device = device
        self.windows: tuple[_Window, ...] = tuple(dict.fromkeys(config.windows))
        self.scratch = Scratch.make(NUM_SLOTS, config.num_heads, config.num_kv_heads, config.head_dim, device)
        self.most_items = most_shares(card, config.num_kv_heads)
        self.recorded_programs = max(1, card.num_sms * _RECORDED_PROGRAMS_PER_SM // config.num_kv_heads)
        self._config = config
        self._rope = rope
        self._is_packed = kv_format.dtype is None
        self._block_size = block_size
        self._card = card
        self._tables = BlockTables()
        self._guess: _Guess | None = None

    def prepare(self, batch: Batch) -> PreparedStep:
        """The step in memory of its own."""
        entries = batch.entries
        step = self.arrays(entries)
        rows = np.array(sample_rows(entries), dtype=np.int64)
        arrays = {**step.arrays, "sample_rows": rows}
        layout = Layout.of({name: array.size for name, array in arrays.items()})
        buffer = write(layout, arrays, pinned=self._pins).to(self.device, non_blocking=True)
        programs = {w: len(step.arrays[_items(w)]) for w in self.windows}
        inputs = self.inputs(layout, buffer, step.tile, programs)
        token_ids = layout.view(buffer, "token_ids")
        return PreparedStep(token_ids, inputs, entries, first_rows(entries), layout.view(buffer, "sample_rows"))

    def arrays(self, entries: Sequence[BatchEntry]) -> StepArrays:
        """Everything that the device must know of the step."""
        counts = np.array([e.num_tokens for e in entries], dtype=np.int64)
        starts = np.array([e.start for e in entries], dtype=np.int64)
        tables = self._tables.of(entries)
        lengths = np.array([len(t) for t in tables], dtype=np.int64)
        spans = Spans(np.cumsum(counts) - counts, starts, counts, np.cumsum(lengths) - lengths)
        blocks = np.concatenate(tables)
        positions = np.repeat(starts - spans.rows, counts) + np.arange(counts.sum())
        block = blocks[np.repeat(spans.tables, counts) + positions // self._block_size]
        tile = self.tile(int(counts.max()))
        token_ids = np.array([t for e in entries for t in e.token_ids], dtype=np.int64)
        arrays = {
            "token_ids": token_ids,
            "positions": positions,
            "slots": block * self._block_size + positions % self._block_size,
        }
        for window in self.windows:
            items = plan_items(spans, tile, self._group, window, Sharing(self.most_items, NUM_SLOTS))
            arrays[_count(window)] = np.array([len(items)], dtype=np.int64)
            arrays[_items(window)] = items
        return StepArrays({**arrays, "blocks": blocks}, tile)  # The blocks last: `StaticInputs` has room for more.

    def foresee(self, entries: Sequence[BatchEntry]) -> None:
        """Build the next decode step while the device works on this one: only tokens and new blocks are unknown."""
        guessed, new_blocks, place = [], {}, 0
        for i, entry in enumerate(entries):
            ids, start = entry.block_ids, entry.context_len
            if start == len(ids) * self._block_size:
                new_blocks[i] = place + len(ids)
                ids = (*ids, 0)
            place += len(ids)
            guessed.append(replace(entry, token_ids=(0,), start=start, block_ids=ids))
        self._guess = _Guess(guessed, self.arrays(guessed), new_blocks)

    def decode_arrays(self, entries: Sequence[BatchEntry]) -> StepArrays:
        """`arrays` of a step with one token per sequence; ready but for the tokens if it was foreseen."""
        guess, self._guess = self._guess, None
        if guess is None or not _came_true(guess, entries):
            return self.arrays(entries)
        arrays = guess.step.arrays
        arrays["token_ids"] = np.array([e.token_ids[0] for e in entries], dtype=np.int64)
        for i, place in guess.new_blocks.items():
            arrays["blocks"][place] = entries[i].block_ids[-1]
            arrays["slots"][i] = entries[i].block_ids[-1] * self._block_size
        return guess.step

    def tile(self, num_tokens: int) -> AttentionTile:
        """Attention's tile for a step whose sequences have up to so many query tokens."""
        return select_attention(self._card, self._config.head_dim, self._group, num_tokens, packed=self._is_packed)

    def inputs(
        self, layout: Layout, buffer: torch.Tensor, tile: AttentionTile, programs: Mapping[_Window, int]
    ) -> TritonInputs:
        """What the layers read, from a buffer that is laid out so."""
        work = {
            w: Work(layout.view(buffer, _count(w)), layout.view(buffer, _items(w)), programs[w]) for w in self.windows
        }
        placement = Placement(
            layout.view(buffer, "positions"), layout.view(buffer, "slots"), self._rope.cos, self._rope.sin
        )
        return TritonInputs(placement, layout.view(buffer, "blocks"), work, tile, self.scratch)

    @property
    def _group(self) -> int:
        return self._config.num_heads // self._config.num_kv_heads

    @property
    def _pins(self) -> bool:
        return self.device.type == "cuda"


class StaticInputs:
    """Fixed places on the device for decode steps of up to `num_rows` sequences, one token each."""

    def __init__(self, steps: DeviceSteps, num_rows: int, max_blocks: int) -> None:
        """`max_blocks`: of one sequence."""
        # Every share beyond a sequence's first takes a slot.
        most = min(num_rows * steps.most_items, num_rows + NUM_SLOTS)
        lengths = {"token_ids": num_rows, "positions": num_rows, "slots": num_rows}
        for window in steps.windows:
            lengths |= {_count(window): 1, _items(window): most * NUM_FIELDS}
        self.num_rows = num_rows
        self._steps = steps
        self._layout = Layout.of({**lengths, "blocks": num_rows * max_blocks})
        self._buffer = torch.zeros(self._layout.total, dtype=torch.int32, device=steps.device)
        tile = steps.tile(1)
        programs = dict.fromkeys(steps.windows, min(most, steps.recorded_programs))
        self.inputs = steps.inputs(self._layout, self._buffer, tile, programs)
        self.token_ids = self._layout.view(self._buffer, "token_ids")

    @property
    def num_bytes(self) -> int:
        return self._buffer.numel() * self._buffer.element_size()

    def load(self, entries: Sequence[BatchEntry]) -> None:
        """Put a step in its places, after whatever the device still has to do with the last one."""
        arrays = dict(self._steps.decode_arrays(entries).arrays)
        missing = self.num_rows - len(entries)
        for name, filler in (("token_ids", 0), ("positions", 0), ("slots", _NO_SLOT)):
            arrays[name] = np.pad(arrays[name], (0, missing), constant_values=filler)
        host = write(self._layout, arrays, pinned=self._steps.device.type == "cuda")
        self._buffer[: len(host)].copy_(host, non_blocking=True)


def _came_true(guess: _Guess, entries: Sequence[BatchEntry]) -> bool:
    """Whether a step is the one that was expected, whatever its tokens and the blocks that are new in it."""
    if len(entries) != len(guess.entries):
        return False
    for i, (expected, entry) in enumerate(zip(guess.entries, entries, strict=True)):
        known = len(expected.block_ids) - (i in guess.new_blocks)
        same_blocks = (
            len(entry.block_ids) == len(expected.block_ids) and entry.block_ids[:known] == expected.block_ids[:known]
        )
        if entry.request_id != expected.request_id or entry.start != expected.start or not same_blocks:
            return False
    return True


def _count(window: _Window) -> str:
    return f"num_items {window}"


def _items(window: _Window) -> str:
    return f"items {window}"
