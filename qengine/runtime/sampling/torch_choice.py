"""Choosing tokens in torch: the CPU's way, and that of devices without Triton.

The rules are those of `quant_kernels.sampling.reference`: tokens are ordered by their float32 distance from the largest
logit, those of one distance by id; min_p, top_k and top_p each keep a prefix of that order, which ends at a *limit* and
with so many *ties* at it; the draw goes in the order of ids. Sums are float64.

A prefix usually ends among a row's likeliest, so a few of those are picked out first, then many, and only a row whose
prefix they do not hold is sorted. Invariant: which way a row goes depends on that row alone, so its neighbours cannot
change its token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from qengine.runtime.sampling.settings import RowSettings

#: How many of the likeliest are looked at before paying for a sort.
_FEW, _MANY = 128, 1024
#: Weights that are added up before the running sum sees them.
_CHUNK = 256
#: About where exp leaves float32's normal numbers. Below, it is 0: processors take ten times as long, devices differ.
_LEAST_EXPONENT = -87.0


@dataclass(frozen=True, slots=True)
class _Rows:
    """The settings of some rows as columns [rows, 1] on the device; `farthest` is the distance that min_p allows."""

    temperature: torch.Tensor
    farthest: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    uniform: torch.Tensor

    @classmethod
    def of(cls, settings: RowSettings, vocab: int, device: torch.device) -> _Rows:
        def column(values: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=device).unsqueeze(1)

        temperature = column(settings.temperature, torch.float64)
        return cls(
            temperature=temperature.float(),
            farthest=(temperature * -column(settings.min_p, torch.float64).log()).float(),
            top_k=column([k or vocab for k in settings.top_k], torch.int64),
            top_p=column(settings.top_p, torch.float64),
            uniform=column(settings.uniform, torch.float64),
        )


def choose(logits: torch.Tensor, settings: RowSettings) -> torch.Tensor:
    """One token per row.

    Args:
        logits: [rows, vocab], any float dtype.

    Returns:
        int64 [rows]; -1 where a row holds NaN or +inf or nothing but -inf.
    """
    drawn = [row for row, temperature in enumerate(settings.temperature) if temperature > 0]
    if len(drawn) == len(logits):
        return _draw(logits.float(), settings)
    tokens = _likeliest(logits)
    tokens.masked_fill_(~logits.gather(1, tokens.unsqueeze(1)).squeeze(1).isfinite(), -1)
    if drawn:
        tokens[drawn] = _draw(logits[drawn].float(), settings.rows(drawn))
    return tokens


def _likeliest(logits: torch.Tensor) -> torch.Tensor:
    """The id of each row's largest logit, or of its first NaN."""
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        # A fifth of torch's time for one row, and without its threads.
        return torch.from_numpy(logits.numpy().argmax(axis=-1))
    return logits.argmax(dim=-1)


def _draw(logits: torch.Tensor, settings: RowSettings) -> torch.Tensor:
    """Tokens of rows that are all to be drawn from float32 [rows, vocab]."""
    top = logits.amax(dim=-1, keepdim=True)
    ways: dict[int, list[int]] = {}
    for row, (top_k, top_p) in enumerate(zip(settings.top_k, settings.top_p, strict=True)):
        ways.setdefault(_num_candidates(top_k, top_p), []).append(row)
    tokens = torch.full((len(logits),), -1, device=logits.device)
    for count, rows in ways.items():
        is_all = len(rows) == len(logits)
        part, tops = (logits, top) if is_all else (logits[rows], top[rows])
        columns = _Rows.of(settings.rows(rows), logits.shape[1], logits.device)
        tokens[rows] = _draw_prefix(part, tops, columns, count) if count else _draw_any(part, tops, columns)
    return tokens.masked_fill_(~top.squeeze(1).isfinite(), -1)


def _num_candidates(top_k: int, top_p: float) -> int:
    """How many of the likeliest to look at; 0 where neither filter is on."""
    if top_k >= _FEW:
        return _MANY
    return _FEW if top_k or top_p < 1.0 else 0


def _weights(logits: torch.Tensor, top: torch.Tensor, rows: _Rows) -> torch.Tensor:
    """exp(-distance / temperature) of float32 [rows, n], 0 beyond what min_p allows."""
    distances = torch.sub(logits, top)
    is_far = distances < -rows.farthest if bool(rows.farthest.isfinite().any()) else None
    weights = _exp(distances.mul_(1.0 / rows.temperature))
    return weights if is_far is None else weights.masked_fill_(is_far, 0.0)


def _exp(exponents: torch.Tensor) -> torch.Tensor:
    """exp of numbers up to 0, 0 where it would not be a normal number; changes them in place."""
    # False for NaN too: a row's weights must not depend on what its neighbours hold.
    if bool(exponents.amin() >= _LEAST_EXPONENT):
        return exponents.exp_()
    is_tiny = exponents < _LEAST_EXPONENT
    return exponents.clamp_(min=_LEAST_EXPONENT).exp_().masked_fill_(is_tiny, 0.0)


def _draw_any(logits: torch.Tensor, top: torch.Tensor, rows: _Rows) -> torch.Tensor:
    return _invert(_weights(logits, top, rows), rows.uniform)


def _draw_prefix(logits: torch.Tensor, top: torch.Tensor, rows: _Rows, count: int) -> torch.Tensor:
    """Draw from what top_k and top_p keep, found among the `count` likeliest where that is enough."""
    vocab = logits.shape[1]
    count = min(count, vocab)
    values, ids = logits.topk(count, dim=-1)
    needs_total = bool((rows.top_k > count).any())
    total = (
        _chunk_sums(_weights(logits, top, rows)).sum(1, keepdim=True) if needs_total else torch.zeros_like(rows.top_p)
    )
    distances = top - values
    limit, ties = _end_of_prefix(distances, rows, total)
    # Nothing at the limit is missing, and the total is of what top_k keeps.
    is_held = (limit < distances[:, -1:]) & ((rows.top_k <= count) | (rows.top_k == vocab))
    ids, order = ids.sort(dim=-1)
    weights = _kept_weights(distances.gather(1, order), rows, limit, ties)
    tokens = ids.gather(1, _invert(weights, rows.uniform).unsqueeze(1)).squeeze(1)
    left = (~is_held).squeeze(1).nonzero().squeeze(1)
    if len(left) and count < vocab:
        some = _Rows(*(getattr(rows, name)[left] for name in _Rows.__slots__))
        tokens[left] = (
            _draw_prefix(logits[left], top[left], some, _MANY)
            if count < _MANY
            else _draw_sorted(top[left] - logits[left], some)
        )
    return tokens


def _draw_sorted(distances: torch.Tensor, rows: _Rows) -> torch.Tensor:
    limit, ties = _end_of_prefix(_sorted(distances), rows, torch.zeros_like(rows.top_p))
    return _invert(_kept_weights(distances, rows, limit, ties), rows.uniform)


def _sorted(distances: torch.Tensor) -> torch.Tensor:
    # numpy sorts floats in vector registers, in half the time.
    if distances.device.type == "cpu":
        return torch.from_numpy(np.sort(distances.numpy(), axis=-1))
    return distances.sort(dim=-1).values


def _end_of_prefix(distances: torch.Tensor, rows: _Rows, total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the kept prefix ends: the distance of its last token, and how many of that distance it holds.

    Args:
        distances: [rows, n], the least ones in ascending order.
        total: float64 [rows, 1], weight of all that min_p keeps; needed where top_k reaches beyond n.
    """
    count = distances.shape[1]
    ranks = torch.arange(count, device=distances.device)
    is_in = (ranks < rows.top_k) & (distances <= rows.farthest)
    weights = _exp(distances * (-1.0 / rows.temperature)).double().masked_fill_(~is_in, 0.0)
    cumulative = weights.cumsum(dim=-1)
    goal = rows.top_p * torch.where(rows.top_k <= count, cumulative[:, -1:], total)
    is_in &= (cumulative.sub_(weights) < goal) | (rows.top_p >= 1.0)
    num_kept = is_in.sum(dim=-1, keepdim=True).clamp_(min=1)
    limit = distances.gather(1, num_kept - 1)
    return limit, num_kept - (distances < limit).sum(dim=-1, keepdim=True)


def _kept_weights(distances: torch.Tensor, rows: _Rows, limit: torch.Tensor, ties: torch.Tensor) -> torch.Tensor:
    """Weights of a prefix, 0 for the rest, for distances [rows, n] in the order of ids."""
    tied = distances == limit
    is_kept = (distances < limit) | (tied & (tied.cumsum(dim=-1, dtype=torch.int32) <= ties))
    return _exp(distances * (-1.0 / rows.temperature)).masked_fill_(~is_kept, 0.0)


def _invert(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """For each row of [rows, n] the first place whose cumulative weight exceeds uniform * total; never one of weight 0.

    Chunks are added up first, so that a running sum in float64 is needed over their sums and within one of them only.
    """
    size = weights.shape[1]
    sums = _chunk_sums(weights)
    chunk, before = _first_above(sums, uniform * sums.sum(dim=-1, keepdim=True))
    places = chunk * _CHUNK + torch.arange(_CHUNK, device=weights.device)
    inside = weights.gather(1, places.clamp(max=size - 1)).masked_fill_(places >= size, 0.0)
    place, _ = _first_above(inside.double(), before)
    # Beyond the end only for rows of NaN.
    return (chunk * _CHUNK + place).squeeze(1).clamp_(max=size - 1)


def _chunk_sums(weights: torch.Tensor) -> torch.Tensor:
    """float64 [rows, chunks], the last of which may be short."""
    rows, size = weights.shape
    num_whole = size // _CHUNK
    whole, rest = weights[:, : num_whole * _CHUNK], weights[:, num_whole * _CHUNK :]
    sums = whole.view(rows, num_whole, _CHUNK).sum(dim=-1, dtype=torch.float64)
    return torch.cat([sums, rest.sum(dim=-1, dtype=torch.float64, keepdim=True)], dim=1)


def _first_above(addends: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first place [rows, 1] whose cumulative sum exceeds the target, and how far into it the target lies."""
    cumulative = addends.cumsum(dim=-1)
    # Rounding may lift a target to the total, which nothing exceeds.
    target = torch.minimum(target, torch.nextafter(cumulative[:, -1:], torch.zeros_like(target)))
    place = torch.searchsorted(cumulative, target, right=True).clamp_(max=addends.shape[1] - 1)
    before = (cumulative - addends).gather(1, place)
    return place, target - before
