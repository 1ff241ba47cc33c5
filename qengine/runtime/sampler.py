"""From logits to tokens, for all sampling rows of a step at once.

Order, as in vLLM: logit_bias, allowed tokens, min_tokens -> repetition, presence, frequency penalties -> greedy rows
take the argmax -> temperature -> min_p -> top_k -> top_p -> sample. Reported log-probabilities are of the raw logits.
Invariant: a row's token depends on its own logits, parameters, seed and position only, never on its neighbours: the
random number is a hash of (seed, position) and sampling inverts the row's own distribution with it.
It keeps no state and does not touch requests.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Sequence

import torch

from qengine.request import SamplingParams, TokenLogprobs
from qengine.scheduling.batch import SampledToken, SampleSpec

#: Candidates looked at before paying for a full sort; nearly every top_p set is smaller.
_FIRST_CANDIDATES = 1024


class PendingSamples:
    """Tokens that were asked for."""

    def __init__(self, tokens: list[SampledToken | None]) -> None:
        self._tokens = tokens

    def finish(self) -> list[SampledToken | None]:
        """One per row; None where logits were not finite."""
        return self._tokens


class Sampler:
    """Samples the rows of one step after another."""

    def begin(self, logits: torch.Tensor, specs: Sequence[SampleSpec]) -> PendingSamples:
        """Sample every row of float32 logits [rows, vocab], which may be changed in place."""
        # One pass: NaN and infinity survive a sum, and finite logits cannot overflow one.
        finite: list[bool] = logits.sum(dim=-1).isfinite().tolist()
        rows = [i for i, ok in enumerate(finite) if ok]
        found = iter(sample(logits[rows] if len(rows) < len(finite) else logits, [specs[i] for i in rows]))
        return PendingSamples([next(found) if ok else None for ok in finite])


def make_sampler(device: torch.device) -> Sampler:
    """The sampler of a device."""
    return Sampler()


def sample(logits: torch.Tensor, specs: Sequence[SampleSpec]) -> list[SampledToken]:
    """One token per row.

    Args:
        logits: float32 [rows, vocab]; changed in place. Must be finite.
        specs: one per row.
    """
    wanted = [s.params.logprobs for s in specs]
    raw = torch.log_softmax(logits, dim=-1) if any(w is not None for w in wanted) else None
    for row, spec in enumerate(specs):
        _restrict(logits[row], spec)
        if spec.params.has_penalties:
            _penalize(logits[row], spec)
    tokens = _choose(logits, specs)
    if raw is None:
        return [SampledToken(t) for t in tokens]
    records = [
        None if want is None else token_logprobs(raw[row], token, want)
        for row, (token, want) in enumerate(zip(tokens, wanted, strict=True))
    ]
    return [SampledToken(t, r) for t, r in zip(tokens, records, strict=True)]


def token_logprobs(log_probs: torch.Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    """The record of one position: the token's own log-probability and rank, and the `num_top` likeliest."""
    own = log_probs[token_id]
    rank = int((log_probs > own).sum()) + 1
    values, ids = log_probs.topk(min(num_top, log_probs.shape[-1]))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(token_id, float(own), rank, top)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from a hash of seed and position: the same in any batch and on any machine."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed % 2**64, position), digest_size=8).digest()
    return float(int.from_bytes(digest, "little") >> 11) / 2.0**53


def _restrict(row: torch.Tensor, spec: SampleSpec) -> None:
    """logit_bias, allowed_token_ids and min_tokens, in place."""
    params = spec.params
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=row.device)
        row[ids] += torch.tensor(list(params.logit_bias.values()), device=row.device, dtype=row.dtype)
    if params.allowed_token_ids is not None:
        allowed = torch.tensor(list(params.allowed_token_ids), device=row.device)
        kept = row[allowed].clone()
        row.fill_(-torch.inf)
        row[allowed] = kept
    if len(spec.output_token_ids) < params.min_tokens:
        banned = spec.eos_token_ids | frozenset(params.stop_token_ids or ())
        row[[t for t in banned if t < row.shape[0]]] = -torch.inf


def _penalize(row: torch.Tensor, spec: SampleSpec) -> None:
    """Repetition over prompt and output, then presence and frequency over the output, in place."""
    params = spec.params
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*spec.prompt_token_ids, *spec.output_token_ids}), device=row.device)
        values = row[seen]
        scaled = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
        row[seen] = scaled
    if (params.presence_penalty or params.frequency_penalty) and spec.output_token_ids:
        counts = Counter(spec.output_token_ids)
        ids = torch.tensor(list(counts), device=row.device)
        times = torch.tensor(list(counts.values()), device=row.device, dtype=row.dtype)
        row[ids] -= params.presence_penalty + params.frequency_penalty * times


def _choose(logits: torch.Tensor, specs: Sequence[SampleSpec]) -> list[int]:
    random_rows = [i for i, s in enumerate(specs) if not s.params.is_greedy]
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    if random_rows:
        chosen = logits if len(random_rows) == len(specs) else logits[random_rows]
        for row, token in zip(random_rows, _sample_rows(chosen, [specs[i] for i in random_rows]), strict=True):
            tokens[row] = token
    return tokens


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, device=like.device, dtype=like.dtype).unsqueeze(1)


def _sample_rows(logits: torch.Tensor, specs: Sequence[SampleSpec]) -> list[int]:
    """Temperature, min_p, top_k, top_p and one draw for each row of [rows, vocab].

    Which of three ways a row goes depends on that row alone, so that its neighbours cannot change its token.
    """
    params = [s.params for s in specs]
    probs = torch.softmax(logits / _column([p.temperature for p in params], logits), dim=-1)
    draws = torch.tensor([uniform(s.seed, s.position) for s in specs], dtype=torch.float64, device=logits.device)
    if any(p.min_p > 0 for p in params):
        floor = probs.amax(dim=-1, keepdim=True) * _column([p.min_p for p in params], probs)
        probs = probs.masked_fill(probs < floor, 0.0)
    vocab = logits.shape[-1]
    filtered = [i for i, p in enumerate(params) if 0 < p.top_k < vocab or p.top_p < 1.0]
    tokens: list[int] = [0] * len(specs)
    plain = [i for i in range(len(specs)) if i not in set(filtered)]
    if plain:
        _assign(tokens, plain, _invert(probs[plain], draws[plain]))
    if filtered:
        kept = [params[i] for i in filtered]
        _assign(tokens, filtered, _sample_filtered(probs[filtered], draws[filtered], kept))
    return tokens


def _assign(tokens: list[int], rows: list[int], values: torch.Tensor) -> None:
    for row, value in zip(rows, values.tolist(), strict=True):
        tokens[row] = value


def _sample_filtered(probs: torch.Tensor, draws: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Draw from each row's top_k and top_p set: from its likeliest candidates, or after a full sort where those do not
    hold the set."""
    vocab = probs.shape[-1]
    top_k = torch.tensor([p.top_k if 0 < p.top_k < vocab else vocab for p in params], device=probs.device)
    top_p = torch.tensor([p.top_p for p in params], device=probs.device, dtype=torch.float64)
    totals = probs.double().sum(dim=-1)
    count = min(_FIRST_CANDIDATES, vocab)
    values, ids = probs.topk(count, dim=-1)
    mass = values.double().sum(dim=-1) / totals
    is_short = (top_k <= count) | ((top_p < 1.0) & (mass >= top_p)) | torch.full_like(top_k, count == vocab).bool()
    picked = _draw(values, ids, draws, totals, top_k, top_p)
    long_rows = (~is_short).nonzero().squeeze(1)
    if len(long_rows):
        sorted_values, sorted_ids = probs[long_rows].sort(dim=-1, descending=True, stable=True)
        chosen = (x[long_rows] for x in (draws, totals, top_k, top_p))
        picked[long_rows] = _draw(sorted_values, sorted_ids, *chosen)
    return picked


def _draw(
    candidates: torch.Tensor,
    ids: torch.Tensor,
    draws: torch.Tensor,
    totals: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
) -> torch.Tensor:
    """Token ids [rows] from candidates in descending order: top_k first, then top_p of what is left."""
    ranks = torch.arange(candidates.shape[-1], device=candidates.device)
    kept = candidates.double().masked_fill(ranks >= top_k.unsqueeze(1), 0.0)
    left = torch.where(top_k <= candidates.shape[-1], kept.sum(dim=-1), totals).unsqueeze(1)
    before = kept.cumsum(dim=-1) - kept
    kept = kept.masked_fill(before >= top_p.unsqueeze(1) * left, 0.0)
    return ids.gather(1, _invert(kept, draws).unsqueeze(1)).squeeze(1)


def _invert(weights: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """For each row the first index whose cumulative weight exceeds draw * total. Zero weights are never picked."""
    cumulative = weights.double().cumsum(dim=-1)
    targets = draws * cumulative[:, -1]
    picked = torch.searchsorted(cumulative, targets.unsqueeze(1), right=True).squeeze(1)
    return picked.clamp_(max=weights.shape[-1] - 1)
