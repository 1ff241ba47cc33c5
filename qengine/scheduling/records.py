"""Records of the scheduler: the limits it is given, the totals it keeps, and its state at one moment. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

from qengine.errors import ConfigError


@dataclass(frozen=True)
class SchedulerLimits:
    """What one step and one request may use at most.

    Attributes:
        max_num_seqs: requests that hold blocks at one time.
        max_num_batched_tokens: tokens computed in one step.
        max_model_len: tokens of prompt and output together.
        max_in_flight: steps that may be handed out before the first one's results are in.

    Raises:
        ConfigError: if a limit is below 1.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_in_flight: int = 1

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "max_in_flight"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1")

    @property
    def max_num_running(self) -> int:
        """Requests that hold blocks at one time and all get a token in each step, so that none waits for another."""
        return min(self.max_num_seqs, self.max_num_batched_tokens)


@dataclass(slots=True)
class SchedulerStats:
    """Running totals. The prefix cache is counted in tokens, once per request, at its first admission.

    `num_oom_steps` counts steps that were taken back because there was no memory for them.
    """

    num_preemptions: int = 0
    num_scheduled_tokens: int = 0
    num_recomputed_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    num_oom_steps: int = 0


@dataclass(frozen=True, slots=True)
class SchedulerSnapshot:
    """State at one moment.

    Attributes:
        num_running: requests that hold blocks.
        num_waiting: requests that hold none, deferred ones included.
        num_deferred: those that wait for a sibling to compute their common prompt.
        kv_usage: share of blocks referenced, 0 to 1.
        num_reserved_blocks: free blocks promised to requests that were preempted as often as allowed.
        stats: a copy of the totals.
    """

    num_running: int
    num_waiting: int
    num_deferred: int
    kv_usage: float
    num_reserved_blocks: int
    stats: SchedulerStats
