"""The specification of sampling: one row at a time, in float64, straight from the definitions. Only tests call it.

A token's *distance* is ``max(logits) - logit`` in float32, and its weight ``exp(-distance / temperature)``. One IEEE
subtraction rounds alike everywhere, so which tokens count as equally likely is the same on every device. Tokens are
ordered by distance, those of one distance by id, and each filter keeps a prefix of that order:

    min_p   tokens of weight >= min_p (the likeliest has weight 1)
    top_k   the first k of them
    top_p   of these, each token before which lies less than top_p of their weight

The draw inverts the cumulative weight of what is kept *in the order of ids*: the first token at which it exceeds
``uniform`` times the total.
"""

from __future__ import annotations

import math

import torch


def is_finite(logits: torch.Tensor) -> bool:
    """Whether a row [vocab] can be sampled: no NaN, no +inf, and something that is not -inf."""
    return math.isfinite(float(logits.float().max()))


def kept_weights(logits: torch.Tensor, temperature: float, min_p: float, top_k: int, top_p: float) -> torch.Tensor:
    """float64 [vocab]: the weight of each token that is kept, 0 for the others.

    Args:
        logits: [vocab], finite or -inf.
        temperature: above 0.
        min_p: 0 is off.
        top_k: 0, negative or at least vocab is off.
        top_p: 1 is off.
    """
    logits = logits.float()
    distance = logits.max() - logits
    weights = torch.exp(-distance.double() / temperature)
    order = torch.argsort(distance, stable=True)
    order = order[weights[order] >= min_p]
    if top_k > 0:
        order = order[:top_k]
    if top_p < 1.0:
        ordered = weights[order]
        before = ordered.cumsum(0) - ordered
        order = order[before < top_p * ordered.sum()]
        order = order if len(order) else torch.argmin(distance).unsqueeze(0)
    kept = torch.zeros_like(weights)
    kept[order] = weights[order]
    return kept


def sample(logits: torch.Tensor, temperature: float, min_p: float, top_k: int, top_p: float, uniform: float) -> int:
    """The token of a row [vocab]; -1 if its logits are not finite.

    Args:
        temperature: 0 takes the likeliest token, the lowest id of equals.
        uniform: in [0, 1).
    """
    if not is_finite(logits):
        return -1
    if temperature == 0.0:
        return int((logits == logits.max()).nonzero()[0])
    cumulative = kept_weights(logits, temperature, min_p, top_k, top_p).cumsum(0)
    return int((cumulative > uniform * cumulative[-1]).nonzero()[0])
