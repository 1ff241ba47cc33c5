"""Admission policy: how many blocks to keep back for the growth of what already runs.

How long an answer gets is unknown, so it is forecast from the lengths of recent answers; the running requests and the
candidate are then played forward to the moment of highest use, which must stay inside the pool less a margin. The
margin is a control loop on the cost itself: a preemption widens it in proportion to the tokens to be computed again,
each token computed narrows it by `_RECOMPUTED_SHARE` of that. So in the long run no larger share of work is repeated.
Invariant: decisions depend only on the sequence of calls (no clock, no random numbers). It guards efficiency alone:
that nothing deadlocks is the scheduler's duty.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterable

#: Recomputed tokens per computed token that the margin settles at: below the 5 % promised, as control lags behind.
_RECOMPUTED_SHARE = 0.03
#: Blocks of margin per block's worth of tokens to recompute, and the most the margin can be as a share of the pool.
_MARGIN_GAIN = 0.2
_MARGIN_LIMIT = 0.25
#: Answers remembered; enough for stable quantiles, few enough to follow a change of traffic within minutes.
_WINDOW = 1024
#: The guess before any answer is known: as likely below as above about 90 tokens, seldom above 1000.
_PRIOR_LENGTHS = (8, 16, 32, 64, 128, 256, 512, 1024)
#: Steps of two low-discrepancy sequences (fractional parts of the golden ratio and of the square root of two).
_GOLDEN, _SQRT2 = 0.6180339887498949, 0.4142135623730951


class OutputLengthForecast:
    """Quantiles of the output lengths seen lately, in tokens."""

    def __init__(self) -> None:
        self._recent: deque[int] = deque(_PRIOR_LENGTHS)
        self._sorted = sorted(_PRIOR_LENGTHS)

    def observe(self, output_len: int) -> None:
        """Record an ended answer."""
        insort(self._sorted, output_len)
        self._recent.append(output_len)
        if len(self._recent) > _WINDOW:
            del self._sorted[bisect_right(self._sorted, self._recent.popleft()) - 1]

    def predict(self, num_generated: int, quantile: float) -> int:
        """The given quantile (0 <= quantile < 1) of final lengths among answers longer than `num_generated`.

        Past everything seen an answer is expected to double.
        """
        shorter = bisect_right(self._sorted, num_generated)
        num_longer = len(self._sorted) - shorter
        if not num_longer:
            return 2 * num_generated
        return self._sorted[shorter + int(quantile * num_longer)]


class GrowthForecast:
    """One request's forecast final output length; renewed whenever the answer outlives it.

    The quantiles of successive requests, and of successive forecasts of one request, are spread evenly over 0..1. So
    the batch as a whole has the lengths of the traffic, short and long, instead of one average that nobody has.
    """

    __slots__ = ("_max_len", "_num_renewals", "_output_len", "_start")

    def __init__(self, arrival: int, max_output_len: int) -> None:
        self._start = arrival * _GOLDEN
        self._max_len = max_output_len
        self._num_renewals = 0
        self._output_len = 0

    def remaining(self, num_generated: int, lengths: OutputLengthForecast) -> int:
        """Tokens still to come after `num_generated`, at least 1 and at most what max_tokens leaves."""
        if num_generated >= self._output_len:
            quantile = (self._start + self._num_renewals * _SQRT2) % 1.0
            self._num_renewals += 1
            self._output_len = max(num_generated + 1, min(self._max_len, lengths.predict(num_generated, quantile)))
        return self._output_len - num_generated


class AdmissionPolicy:
    """Decides whether one more request may start, given what the running ones will still need."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._margin = 0.0
        self.lengths = OutputLengthForecast()

    @property
    def margin(self) -> float:
        """Blocks kept free above the forecast."""
        return self._margin

    def on_computed(self, num_tokens: int) -> None:
        """Count the tokens of a step, repeated ones included."""
        self._move_margin(-_RECOMPUTED_SHARE * num_tokens)

    def on_preempted(self, num_lost_tokens: int) -> None:
        """Count a preemption that makes up to `num_lost_tokens` computed tokens be computed again."""
        self._move_margin(num_lost_tokens)

    def on_ended(self, output_len: int) -> None:
        """Learn from an answer that ended, for whatever reason, after `output_len` tokens."""
        if output_len:
            self.lengths.observe(output_len)

    def _move_margin(self, num_tokens: float) -> None:
        margin = self._margin + _MARGIN_GAIN * num_tokens / self._block_size
        self._margin = min(max(margin, 0.0), _MARGIN_LIMIT * self._num_blocks)

    def fits(self, num_used: int, sequences: Iterable[tuple[int, int]]) -> bool:
        """Whether the forecast peak leaves the margin free.

        Args:
            num_used: blocks taken or promised once the candidate is in.
            sequences: for each sequence that grows, the candidate included: tokens still to come, and blocks that
                become free when it ends.
        """
        return peak_blocks(num_used, sequences, self._block_size) <= self._num_blocks - self._margin


def peak_blocks(num_used: int, sequences: Iterable[tuple[int, int]], block_size: int) -> float:
    """Highest number of blocks in use from now on if nothing else is admitted.

    All sequences grow by one token a step, so use rises between ends and the peak lies just before one of them:
    at time t it is what is used now, less what ended before t, plus t / block_size for each one still alive.
    """
    ordered = sorted(sequences)
    num_alive = len(ordered)
    peak = float(num_used)
    for remaining, num_freed in ordered:
        peak = max(peak, num_used + num_alive * remaining / block_size)
        num_used -= num_freed
        num_alive -= 1
    return peak
