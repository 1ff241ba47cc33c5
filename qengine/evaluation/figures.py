"""The result of an evaluation: plain values with their JSON, and lines for a model card.

Invariant: figures never stand without the protocol that they were measured by.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from qengine.evaluation.scoring import Scores

#: Of a normal distribution: 95 % lie within so many standard deviations.
_Z = 1.96


@dataclass(frozen=True, slots=True)
class Protocol:
    """How it was measured.

    Attributes:
        text: the source.
        num_sequences: separate texts in it.
        num_tokens: in all of them, special tokens included.
        num_scored: tokens that were predicted.
        window: tokens that the model reads together, at most.
        stride: tokens from the start of one window to that of the next; what overlaps is context and not scored again.
        num_windows: in all.
        bos: the token before each text (not before each window), or None.
    """

    text: str
    num_sequences: int
    num_tokens: int
    num_scored: int
    window: int
    stride: int
    num_windows: int
    bos: str | None


@dataclass(frozen=True, slots=True)
class ModelFigures:
    """One model by itself.

    Attributes:
        name, description, dtype, device: what it ran as.
        perplexity: exp of the mean negative log-likelihood.
        perplexity_error: standard error of the perplexity, tokens taken as independent.
    """

    name: str
    description: str
    dtype: str
    device: str
    perplexity: float
    perplexity_error: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """A model against its original. Divergences are KL(original || model) of next-token distributions, in nats.

    Attributes:
        perplexity_change: (perplexity / the original's) - 1.
        mean_kl, mean_kl_error: with the standard error of the mean.
        median_kl, p999_kl, max_kl: the middle, the 99.9th percentile and the largest.
        top1_agreement: share of tokens where both find the same token likeliest.
        top1_low, top1_high: its 95 % confidence interval (Wilson).
    """

    perplexity_change: float
    mean_kl: float
    mean_kl_error: float
    median_kl: float
    p999_kl: float
    max_kl: float
    top1_agreement: float
    top1_low: float
    top1_high: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All of it; `original` and `comparison` are None where nothing was compared with."""

    protocol: Protocol
    model: ModelFigures
    original: ModelFigures | None
    comparison: Comparison | None
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Nested plain values, under the names of the attributes."""
        return asdict(self)

    def as_markdown(self) -> str:
        """A table and the protocol, for a model card."""
        rows = [f"| {name} | {value} |" for name, value in self.rows().items()]
        return "\n".join(
            ["| | |", "|---|---:|", *rows, "", f"Measured with `qengine evaluate`: {self.protocol_text()}"]
        )

    def rows(self) -> Mapping[str, str]:
        """What a reader looks at, by name."""
        found = {"perplexity": _with_error(self.model.perplexity, self.model.perplexity_error)}
        if self.original is None or self.comparison is None:
            return found
        change = self.comparison
        return {
            "perplexity of the original": _with_error(self.original.perplexity, self.original.perplexity_error),
            **found,
            "perplexity, change": f"{change.perplexity_change:+.2%}",
            "KL divergence, mean": f"{change.mean_kl:.5f} ± {change.mean_kl_error:.5f}",
            "KL divergence, median": f"{change.median_kl:.5f}",
            "KL divergence, 99.9th percentile": f"{change.p999_kl:.4f}",
            "KL divergence, largest": f"{change.max_kl:.4f}",
            "top-1 agreement": f"{change.top1_agreement:.2%} ({change.top1_low:.2%} to {change.top1_high:.2%})",
        }

    def protocol_text(self) -> str:
        """The protocol in a sentence or two."""
        found = self.protocol
        texts = f"{found.num_sequences} texts" if found.num_sequences > 1 else "one text"
        overlap = "no overlap" if found.stride == found.window else f"stride {found.stride}"
        bos = "no token before it" if found.bos is None else f"{found.bos} before it"
        return (
            f"{found.text} ({texts}, {bos}), {found.num_tokens} tokens in {found.num_windows} windows of at most "
            f"{found.window}, {overlap}; {found.num_scored} tokens scored."
        )


def perplexity(nll: torch.Tensor) -> tuple[float, float]:
    """Perplexity and its standard error, of negative log-likelihoods [tokens]."""
    mean, error = _mean(nll)
    value = _exp(mean)
    return value, value * error


def comparison(scores: Scores) -> Comparison:
    """Of two models' scores."""
    own, _ = _mean(torch.cat(scores.nll))
    original, _ = _mean(torch.cat(scores.original_nll))
    kl = torch.cat(scores.kl).double()
    mean_kl, error = _mean(kl)
    agrees = torch.cat(scores.agrees)
    low, high = _wilson(int(agrees.sum()), len(agrees))
    return Comparison(
        perplexity_change=_exp(own - original) - 1,
        mean_kl=mean_kl,
        mean_kl_error=error,
        median_kl=_quantile(kl, 0.5),
        p999_kl=_quantile(kl, 0.999),
        max_kl=float(kl.max()),
        top1_agreement=float(agrees.double().mean()),
        top1_low=low,
        top1_high=high,
    )


def _mean(values: torch.Tensor) -> tuple[float, float]:
    """The mean and its standard error; 0 where there is one value."""
    values = values.double()
    count = len(values)
    error = float(values.std(unbiased=True)) / math.sqrt(count) if count > 1 else 0.0
    return float(values.mean()), error


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _quantile(values: torch.Tensor, share: float) -> float:
    """With linear interpolation, as numpy's; torch.quantile refuses more than 16 million values."""
    ordered = values.sort().values
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (ordered[high] - ordered[low]) * (position - low))


def _wilson(successes: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share; unlike the normal approximation it stays within 0 and 1."""
    share, z2 = successes / count, _Z * _Z
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def _with_error(value: float, error: float) -> str:
    return f"{value:.4f} ± {error:.4f}"
