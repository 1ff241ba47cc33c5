"""Log-probabilities for the rows that ask: of the model's own logits, so they are taken before any edit.

Invariant: what is computed on a device stays there until it is asked for; a row's record does not depend on how many
its neighbours want.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from qengine.request import TokenLogprobs
from qengine.runtime.sampling.transfer import to_device, to_host
from qengine.scheduling.batch import SampleSpec


@dataclass(frozen=True, slots=True)
class RawLogprobs:
    """log_softmax of the rows that ask.

    Attributes:
        wanted: of each row of the step, how many of the likeliest tokens to name; None where nothing is asked.
        rows: int64 [asked], which rows those are, on the device.
        log_probs: float32 [asked, vocab].
    """

    wanted: tuple[int | None, ...]
    rows: torch.Tensor
    log_probs: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, specs: Sequence[SampleSpec]) -> RawLogprobs | None:
        """None if no row asks."""
        wanted = tuple(spec.params.logprobs for spec in specs)
        asked = [row for row, want in enumerate(wanted) if want is not None]
        if not asked:
            return None
        (rows,) = to_device([np.array(asked, np.int64)], logits.device)
        chosen = logits if len(asked) == len(specs) else logits.index_select(0, rows)
        return cls(wanted, rows, torch.log_softmax(chosen, dim=-1, dtype=torch.float32))

    def report(self, token_ids: torch.Tensor) -> PendingLogprobs:
        """Look up the sampled tokens, int [rows]; entries below 0 yield nothing of use."""
        return PendingLogprobs.of(self.log_probs, token_ids.index_select(0, self.rows), self.wanted)


@dataclass(frozen=True, slots=True)
class PendingLogprobs:
    """Log-probabilities on their way to the host: a row each of (rank, top ids) and (own, top values)."""

    wanted: tuple[int | None, ...]
    ids: torch.Tensor
    values: torch.Tensor

    @classmethod
    def of(cls, log_probs: torch.Tensor, token_ids: torch.Tensor, wanted: tuple[int | None, ...]) -> PendingLogprobs:
        """Look tokens up, int [asked], in log_probs [asked, vocab]; `wanted` is as of `RawLogprobs`."""
        own = log_probs.gather(1, token_ids.long().clamp_(min=0).unsqueeze(1))
        ranks = (log_probs > own).sum(dim=-1, keepdim=True) + 1
        num_top = min(max(want or 0 for want in wanted), log_probs.shape[1])
        values, ids = log_probs.topk(num_top, dim=-1)
        return cls(wanted, to_host(torch.cat([ranks, ids], dim=1)), to_host(torch.cat([own, values], dim=1)))

    def records(self, token_ids: Sequence[int]) -> list[TokenLogprobs | None]:
        """The record of each row of the step, None where none was asked for. The copies must be complete."""
        rows = iter(zip(self.ids.tolist(), self.values.tolist(), strict=True))
        records: list[TokenLogprobs | None] = []
        for token, want in zip(token_ids, self.wanted, strict=True):
            if want is None:
                records.append(None)
                continue
            (rank, *ids), (own, *values) = next(rows)
            top = tuple(zip(ids[:want], values[:want], strict=True))
            records.append(TokenLogprobs(token, own, rank, top))
        return records


@dataclass(frozen=True, slots=True)
class PendingPromptLogprobs:
    """Log-probabilities of tokens of a prompt, a few positions to a piece; complete with the step that has them."""

    token_ids: Sequence[int]
    pieces: Sequence[PendingLogprobs]

    @classmethod
    def of(cls, logits: Iterable[torch.Tensor], token_ids: Sequence[int], num_top: int) -> PendingPromptLogprobs:
        """Look up the token that follows each position, and the `num_top` likeliest.

        Args:
            logits: [rows, vocab] of some positions at a time; made one after the other, since all would be too many.
            token_ids: one per position, over all pieces.
        """
        pieces, first = [], 0
        for piece in logits:
            rows = len(piece)
            (tokens,) = to_device([np.array(token_ids[first : first + rows], np.int64)], piece.device)
            log_probs = torch.log_softmax(piece, dim=-1, dtype=torch.float32)
            pieces.append(PendingLogprobs.of(log_probs, tokens, (num_top,) * rows))
            first += rows
        return cls(token_ids, pieces)

    def records(self) -> list[TokenLogprobs]:
        """One per position. The copies must be complete."""
        found: list[TokenLogprobs | None] = []
        for piece in self.pieces:
            found += piece.records(self.token_ids[len(found) : len(found) + len(piece.wanted)])
        return [record for record in found if record is not None]
