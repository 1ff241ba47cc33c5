"""What one step did, counted for whoever watches an engine.

Invariant: a sequence's prompt and its time to first token are counted in the step that gives its first token, each
later token with the time since the one before; so sums over steps are sums over sequences. Sequences that get a token
in the same step share its end as their time, hence `gaps` has few distinct values however many run. It keeps nothing
between steps and knows no metrics: names and buckets are serving's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from qengine.request import Request, RequestTimes


@dataclass(slots=True)
class StepStats:
    """One step. Times in seconds of `time.monotonic`, durations in seconds.

    Attributes:
        began, scheduled, executed, ended: the step's three phases lie between them.
        num_prompt_tokens: of the prompts that got their first token or their embedding; `num_cached_tokens` of them
            came from the cache.
        first_token_seconds: from arrival to first token, one for each such prompt.
        gaps: time between two tokens of a sequence -> how many sequences had just that.
        collective_seconds: the slowest rank's, of each step of which all ranks have told by now.
        finished: sequences that ended in this step, for whatever reason.
    """

    began: float
    scheduled: float
    executed: float
    ended: float = 0.0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    first_token_seconds: list[float] = field(default_factory=list)
    collective_seconds: Sequence[float] = ()
    gaps: dict[float, int] = field(default_factory=dict)
    finished: list[Request] = field(default_factory=list)

    def count(self, request: Request, num_new_tokens: int) -> None:
        """Take in a sequence that got `num_new_tokens` tokens or ended, and stamp its times. Call it once per step."""
        if num_new_tokens:
            if request.first_token_time:
                gap = self.executed - request.last_token_time
                self.gaps[gap] = self.gaps.get(gap, 0) + 1
            else:
                request.first_token_time = self.executed
                self.first_token_seconds.append(self.executed - request.arrival_time)
                self.num_prompt_tokens += request.num_prompt_tokens
                self.num_cached_tokens += request.num_cached_tokens
            request.last_token_time = self.executed
            self.num_generated_tokens += num_new_tokens
        elif request.pooling is not None:
            self.num_prompt_tokens += request.num_prompt_tokens
            self.num_cached_tokens += request.num_cached_tokens
        if request.finished:
            self.finished.append(request)


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """How busy an engine is at one moment.

    Attributes:
        num_running: sequences that hold blocks; `num_waiting` hold none.
        num_deferred: those of the waiting that wait for a sibling to compute their common prompt.
        num_free_blocks: KV blocks that nobody uses; `num_free_cached_blocks` of them can still be found by a prompt.
    """

    num_running: int
    num_waiting: int
    num_deferred: int
    num_free_blocks: int
    num_free_cached_blocks: int


class StepObserver(Protocol):
    """Who watches an engine. Called in the engine's thread, so it must be quick; it may read, not change."""

    def on_step(self, stats: StepStats) -> None:
        """A step has run."""

    def on_group_end(self, sequences: Sequence[Request]) -> None:
        """The last of a request's choices has ended."""

    def on_abort(self, sequences: Sequence[Request]) -> None:
        """The owner of a request has dropped it; those of its choices that had not ended."""


def times_of(sequences: Sequence[Request]) -> RequestTimes:
    """The times of a request whose choices are `sequences`."""

    def first(times: list[float]) -> float:
        return min((time for time in times if time), default=0.0)

    return RequestTimes(
        arrival=sequences[0].arrival_time,
        queued=sequences[0].queued_time,
        scheduled=first([sequence.scheduled_time for sequence in sequences]),
        first_token=first([sequence.first_token_time for sequence in sequences]),
        last_token=max(sequence.last_token_time for sequence in sequences),
    )
