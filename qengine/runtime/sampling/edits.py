"""What requests change in their logits, for all rows of a step in a handful of operations.

Order, as in vLLM: logit_bias, allowed tokens, grammar, min_tokens -> repetition, presence, frequency penalties. The
host gathers places in the flattened logits, row * vocab + id, and a number for each; the device adds, fills and copies
there. What a grammar allows is one bit per token, travels packed and is unpacked on the device.
Invariant: no operation per row, and nothing is read back. Token ids beyond the vocabulary are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch

from qengine.runtime.sampling.history import History
from qengine.runtime.sampling.transfer import to_device
from qengine.scheduling.batch import SampleSpec

Numbers = np.ndarray[Any, Any]


@dataclass(slots=True)
class _Places:
    """Places in flattened logits, one array per row, and a number for each place where one is needed."""

    places: list[Numbers] = field(default_factory=list)
    values: list[Numbers] = field(default_factory=list)

    def add(self, places: Numbers, values: Numbers | None = None) -> None:
        self.places.append(places)
        if values is not None:
            self.values.append(values)

    def all_places(self) -> Numbers:
        return np.concatenate([np.empty(0, np.int64), *self.places])

    def all_values(self) -> Numbers:
        return np.concatenate([np.empty(0, np.float32), *self.values]).astype(np.float32)


@dataclass(slots=True)
class Edits:
    """The edits of one step, on the host.

    Attributes:
        biased: what logit_bias adds to.
        restricted: rows that have allowed tokens.
        allowed: those tokens.
        masked: rows that a grammar restricts.
        masks: packed uint32 words of what it allows, for each of those rows. A grammar minds min_tokens itself, since
            it knows when nothing but the end may follow.
        banned: end-of-sequence and stop tokens of rows that are too short to end.
        repeated: tokens of prompt and output, each with its row's repetition penalty; a token may come twice.
        penalized: tokens of the output, each with what presence and frequency penalties take away.
    """

    vocab: int
    biased: _Places = field(default_factory=_Places)
    restricted: list[int] = field(default_factory=list)
    allowed: _Places = field(default_factory=_Places)
    masked: list[int] = field(default_factory=list)
    masks: list[bytes] = field(default_factory=list)
    banned: _Places = field(default_factory=_Places)
    repeated: _Places = field(default_factory=_Places)
    penalized: _Places = field(default_factory=_Places)

    @classmethod
    def of(
        cls,
        specs: Sequence[SampleSpec],
        histories: Sequence[History | None],
        vocab: int,
        allowed: Sequence[bytes | None] = (),
    ) -> Edits:
        """Gather the edits of all rows; `allowed` is as of `Sampler.begin`."""
        edits = cls(vocab)
        masks = allowed or (None,) * len(specs)
        for row, (spec, history, mask) in enumerate(zip(specs, histories, masks, strict=True)):
            edits._restrict(row, spec, mask)
            if history is not None:
                edits._penalize(row, spec, history)
        return edits

    def __bool__(self) -> bool:
        tables = (self.biased, self.allowed, self.banned, self.repeated, self.penalized)
        return bool(self.restricted or self.masked) or any(table.places for table in tables)

    def _in_row(self, row: int, ids: Iterable[int]) -> Numbers:
        found = np.asarray(list(ids), dtype=np.int64)
        return found[found < self.vocab] + row * self.vocab

    def _restrict(self, row: int, spec: SampleSpec, mask: bytes | None) -> None:
        params = spec.params
        if params.logit_bias:
            inside = {i: value for i, value in params.logit_bias.items() if i < self.vocab}
            self.biased.add(self._in_row(row, inside), np.array(list(inside.values())))
        if params.allowed_token_ids is not None:
            self.restricted.append(row)
            self.allowed.add(self._in_row(row, params.allowed_token_ids))
        if mask is not None:
            self.masked.append(row)
            self.masks.append(mask)
        elif len(spec.output_token_ids) < params.min_tokens:
            self.banned.add(self._in_row(row, spec.eos_token_ids | frozenset(params.stop_token_ids or ())))

    def _penalize(self, row: int, spec: SampleSpec, history: History) -> None:
        params, first = spec.params, row * self.vocab
        if params.repetition_penalty != 1.0:
            seen = np.concatenate([history.prompt_ids, history.output_ids]) + first
            self.repeated.add(seen, np.full(len(seen), params.repetition_penalty))
        if params.presence_penalty or params.frequency_penalty:
            taken = params.presence_penalty + params.frequency_penalty * history.times
            self.penalized.add(history.output_ids + first, taken)

    def apply(self, logits: torch.Tensor) -> None:
        """Edit logits [rows, vocab] in place.

        Args:
            logits: float32, contiguous, on any device.
        """
        tables = (self.biased, self.allowed, self.banned, self.repeated, self.penalized)
        rows, biased, allowed, banned, repeated, penalized = to_device(
            [np.array(self.restricted, np.int64), *(table.all_places() for table in tables)], logits.device
        )
        biases, penalties, taken = to_device(
            [table.all_values() for table in (self.biased, self.repeated, self.penalized)], logits.device
        )
        flat = logits.view(-1)
        if len(biased):
            flat.index_add_(0, biased, biases)
        if len(rows):
            kept = flat.index_select(0, allowed)
            logits.index_fill_(0, rows, -torch.inf)
            flat.index_copy_(0, allowed, kept)
        if self.masked:
            self._mask(logits)
        if len(banned):
            flat.index_fill_(0, banned, -torch.inf)
        if len(repeated):
            values = flat.index_select(0, repeated)
            flat.index_copy_(0, repeated, torch.where(values > 0, values / penalties, values * penalties))
        if len(penalized):
            flat.index_add_(0, penalized, taken, alpha=-1.0)

    def _mask(self, logits: torch.Tensor) -> None:
        """Leave the masked rows what their grammars allow."""
        (packed,) = to_device([np.frombuffer(bytearray().join(self.masks), np.uint8)], logits.device)
        (rows,) = to_device([np.array(self.masked, np.int64)], logits.device)
        # Eight tokens at a time: adding what a table has for a byte is several times as fast as filling by a mask.
        barriers = barriers_of_bytes(logits.device).index_select(0, packed.int()).view(len(self.masked), -1)
        if len(rows) == len(logits):
            logits.add_(barriers[:, : self.vocab])
        else:
            logits.index_add_(0, rows, barriers[:, : self.vocab])


@cache
def barriers_of_bytes(device: torch.device) -> torch.Tensor:
    """float32 [256, 8]: for each byte and each of its bits, the lowest first, 0 where it is set, else -inf; shared."""
    numbers = torch.arange(256, dtype=torch.int32, device=device).unsqueeze(1)
    bits = numbers.bitwise_right_shift(torch.arange(8, dtype=torch.int32, device=device)).bitwise_and_(1)
    return torch.zeros(256, 8, device=device).masked_fill_(bits == 0, -torch.inf)
