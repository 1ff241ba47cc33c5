"""From logits to a number for each predicted token, a few rows at a time.

Invariant: only `SLICE_BYTES` of logits exist at once, whatever the vocabulary and the window. All is computed in
float32 from float32 logits; sums over tokens are made in float64, where they are made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from qengine.errors import QEngineError

#: Of one model's logits; computing with them takes a few times as much.
SLICE_BYTES = 64 * 2**20

Logits = Callable[[torch.Tensor], torch.Tensor]


@dataclass(slots=True)
class Scores:
    """One number for each scored token, float32 parts to be joined.

    Attributes:
        nll: negative log-likelihood of the token that follows, in nats.
        original_nll: the same by the original.
        kl: divergence of the model's distribution from the original's, KL(original || model), in nats.
        agrees: whether both find the same token likeliest.
    """

    nll: list[torch.Tensor] = field(default_factory=list)
    original_nll: list[torch.Tensor] = field(default_factory=list)
    kl: list[torch.Tensor] = field(default_factory=list)
    agrees: list[torch.Tensor] = field(default_factory=list)


def slice_rows(vocab_size: int) -> int:
    """Rows whose logits are held at once."""
    return max(1, SLICE_BYTES // (4 * vocab_size))


@torch.inference_mode()
def score(scores: Scores, hidden: torch.Tensor, logits_of: Logits, targets: Sequence[int], vocab_size: int) -> None:
    """Add the scores of one window: hidden states [rows, hidden], and the token that follows each.

    Raises:
        QEngineError: if logits are not finite.
    """
    wanted = torch.tensor(targets, dtype=torch.int64, device=hidden.device)
    rows = slice_rows(vocab_size)
    for part, following in zip(torch.split(hidden, rows), torch.split(wanted, rows), strict=True):
        scores.nll.append(_nll(_log_probs(logits_of(part)), following))


@torch.inference_mode()
def compare(
    scores: Scores,
    hidden: torch.Tensor,
    logits_of: Logits,
    original_hidden: torch.Tensor,
    original_logits_of: Logits,
    targets: Sequence[int],
    vocab_size: int,
) -> None:
    """The same for two models, with their divergence. Their hidden sizes and devices need not be alike.

    Raises:
        QEngineError: if logits are not finite.
    """
    rows = slice_rows(vocab_size)
    wanted = torch.tensor(targets, dtype=torch.int64, device=hidden.device)
    split = (torch.split(tensor, rows) for tensor in (hidden, original_hidden, wanted))
    parts = zip(*split, strict=True)
    for part, original_part, following in parts:
        own = _log_probs(logits_of(part))
        original = _log_probs(original_logits_of(original_part)).to(own.device)
        scores.nll.append(_nll(own, following))
        scores.original_nll.append(_nll(original, following))
        scores.agrees.append((own.argmax(-1) == original.argmax(-1)).cpu())
        # Rounding may leave it a little below zero.
        scores.kl.append((original.exp() * (original - own)).sum(-1).clamp_min(0).cpu())


def _log_probs(logits: torch.Tensor) -> torch.Tensor:
    if not logits.isfinite().all():
        raise QEngineError("the model computes logits that are not finite (NaN or infinity) for this text")
    return torch.log_softmax(logits, dim=-1)


def _nll(log_probs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -log_probs.gather(1, targets[:, None])[:, 0].cpu()
