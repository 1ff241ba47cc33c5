"""What the times of many requests come to: percentiles, throughput, goodput.

Invariant: every latency counts from the moment a request was due, not from when it could be sent, so a server that
stalls cannot hide it by slowing the generator. Failed requests count as requests and as not good; their times do not.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PERCENTILES = (50, 90, 99)
#: What a bound may be about, all in milliseconds.
BOUNDS = ("ttft", "tpot", "e2el")


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request. Times in seconds from the start of the run.

    Attributes:
        due_s: when it was to be sent.
        sent_s: when it was.
        piece_s: when each piece of text came.
        end_s: when it ended.
        num_tokens: tokens that came, as the server counts them.
        error: why it failed, None if it did not.
    """

    due_s: float
    sent_s: float
    piece_s: tuple[float, ...]
    end_s: float
    num_tokens: int
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        """Time to the first text."""
        return self.piece_s[0] - self.due_s if self.piece_s else None

    @property
    def tpot_s(self) -> float | None:
        """Time per token after the first one."""
        return (
            (self.piece_s[-1] - self.piece_s[0]) / (self.num_tokens - 1)
            if self.num_tokens > 1 and self.piece_s
            else None
        )

    @property
    def e2el_s(self) -> float:
        """Time to the end."""
        return self.end_s - self.due_s

    @property
    def gaps_s(self) -> tuple[float, ...]:
        """Times between pieces."""
        return tuple(b - a for a, b in zip(self.piece_s, self.piece_s[1:], strict=False))

    def is_good(self, bounds_ms: Mapping[str, float]) -> bool:
        """Whether it succeeded within every bound. A figure that does not exist, such as TPOT of one token, holds."""
        if self.error is not None:
            return False
        found = {"ttft": self.ttft_s, "tpot": self.tpot_s, "e2el": self.e2el_s}
        return all((found[name] or 0.0) * 1000 <= bound for name, bound in bounds_ms.items())


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the values lie, interpolated between neighbours as numpy does."""
    if not values:
        raise ValueError("no values have no percentile")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread_ms(values_s: Sequence[float]) -> dict[str, float] | None:
    """Mean and percentiles in milliseconds; None if there is nothing."""
    if not values_s:
        return None
    values = [value * 1000 for value in values_s]
    return {"mean": sum(values) / len(values), **{f"p{p}": percentile(values, p) for p in PERCENTILES}}


def summarize(rate: float, outcomes: Sequence[Outcome], bounds_ms: Mapping[str, float]) -> dict[str, Any]:
    """The figures of one run, for JSON. Rates are per second of the run: from its start to the last end."""
    done = [outcome for outcome in outcomes if outcome.error is None]
    duration_s = max((outcome.end_s for outcome in outcomes), default=0.0)
    per_s = 1 / duration_s if duration_s > 0 else 0.0
    num_good = sum(outcome.is_good(bounds_ms) for outcome in outcomes)
    return {
        "request_rate": "inf" if math.isinf(rate) else rate,
        "num_requests": len(outcomes),
        "num_completed": len(done),
        "errors": dict(Counter(outcome.error for outcome in outcomes if outcome.error is not None)),
        "duration_s": duration_s,
        "request_throughput": len(done) * per_s,
        "output_token_throughput": sum(outcome.num_tokens for outcome in done) * per_s,
        "num_output_tokens": sum(outcome.num_tokens for outcome in done),
        "ttft_ms": spread_ms([o.ttft_s for o in done if o.ttft_s is not None]),
        "tpot_ms": spread_ms([o.tpot_s for o in done if o.tpot_s is not None]),
        "itl_ms": spread_ms([gap for o in done for gap in o.gaps_s]),
        "e2el_ms": spread_ms([o.e2el_s for o in done]),
        "num_good": num_good,
        "goodput": num_good * per_s,
        # How late the generator itself was: large values mean that this machine could not make the load.
        "send_delay_ms": spread_ms([o.sent_s - o.due_s for o in outcomes]),
    }
