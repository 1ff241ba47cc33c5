"""Log-probabilities for the rows that ask: of the model's own logits, so they are taken before any edit.

Invariant: what is computed on a device stays there until it is asked for; a row's record does not depend on how many
its neighbours want.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        tokens = token_ids.index_select(0, self.rows).long().clamp_(min=0).unsqueeze(1)
        own = self.log_probs.gather(1, tokens)
        ranks = (self.log_probs > own).sum(dim=-1, keepdim=True) + 1
        num_top = min(max(want or 0 for want in self.wanted), self.log_probs.shape[1])
        values, ids = self.log_probs.topk(num_top, dim=-1)
        return PendingLogprobs(
            self.wanted, to_host(torch.cat([ranks, ids], dim=1)), to_host(torch.cat([own, values], dim=1))
        )


@dataclass(frozen=True, slots=True)
class PendingLogprobs:
    """Log-probabilities on their way to the host: a row each of (rank, top ids) and (own, top values)."""

    wanted: tuple[int | None, ...]
    ids: torch.Tensor
    values: torch.Tensor

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


def token_logprobs(log_probs: torch.Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    """The record of one position: the token's own log-probability and rank, and the `num_top` likeliest.

    Args:
        log_probs: [vocab].
    """
    own = log_probs[token_id]
    rank = int((log_probs > own).sum()) + 1
    values, ids = log_probs.topk(min(num_top, log_probs.shape[-1]))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(token_id, float(own), rank, top)
