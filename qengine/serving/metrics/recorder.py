"""From what the engine did to metrics, and the line in the log that sums them up.

Invariant: every sequence that was queued is counted in `request_success` exactly once. Times and sizes are those of
sequences that ended by themselves: one whose client left says nothing of the engine. All methods run in the
engine's thread; a step costs one lock and a few dozen microseconds, however many sequences run.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise

from qengine.request import Request
from qengine.scheduling.records import SchedulerStats
from qengine.serving.metrics.catalog import STEP_PHASES, EngineMetrics
from qengine.step_stats import EngineLoad, StepStats

logger = logging.getLogger(__name__)

LOG_SECONDS = 10.0


class Recorder:
    """Watches one engine."""

    def __init__(self, metrics: EngineMetrics, num_blocks: int) -> None:
        self.metrics = metrics
        self._num_blocks = num_blocks
        self._log = ThroughputLog()

    # StepObserver

    def on_step(self, stats: StepStats) -> None:
        metrics = self.metrics
        self._log.count(stats)
        with metrics.lock:
            self._time_step(stats)
            num_tokens = stats.num_prompt_tokens + stats.num_generated_tokens
            if num_tokens:
                metrics.iteration_tokens.observe(num_tokens)
                metrics.generation_tokens.inc(stats.num_generated_tokens)
            if stats.num_prompt_tokens:
                self._count_prompts(stats)
            for gap, count in stats.gaps.items():
                metrics.inter_token.observe(gap, count=count)
            for sequence in stats.finished:
                self._count_end(sequence)

    def on_group_end(self, sequences: Sequence[Request]) -> None:
        longest = max(len(sequence.output_token_ids) for sequence in sequences)
        with self.metrics.lock:
            self.metrics.params_n.observe(sequences[0].params.n)
            self.metrics.max_num_generation_tokens.observe(longest)

    def on_abort(self, sequences: Sequence[Request]) -> None:
        with self.metrics.lock:
            self.metrics.success.inc(len(sequences), "abort")

    def _time_step(self, stats: StepStats) -> None:
        moments = (stats.began, stats.scheduled, stats.executed, stats.ended)
        for phase, (start, end) in zip(STEP_PHASES, pairwise(moments), strict=True):
            self.metrics.step_time.observe(end - start, phase)
        for seconds in stats.collective_seconds:
            self.metrics.allreduce.observe(seconds)

    def _count_prompts(self, stats: StepStats) -> None:
        metrics, num_cached = self.metrics, stats.num_cached_tokens
        metrics.prompt_tokens.inc(stats.num_prompt_tokens)
        metrics.prompt_tokens_cached.inc(num_cached)
        metrics.prompt_tokens_by_source.inc(stats.num_prompt_tokens - num_cached, "local_compute")
        metrics.prompt_tokens_by_source.inc(num_cached, "local_cache_hit")
        metrics.prompt_tokens_cached_by_source.inc(num_cached, "device")
        for seconds in stats.first_token_seconds:
            metrics.ttft.observe(seconds)

    def _count_end(self, sequence: Request) -> None:
        metrics, num_output = self.metrics, len(sequence.output_token_ids)
        metrics.success.inc(1, str(sequence.finish_reason))
        if sequence.finish_reason == "error" and sequence.error_code is None:
            metrics.corrupted.inc()
        metrics.request_prompt_tokens.observe(sequence.num_prompt_tokens)
        metrics.request_generation_tokens.observe(num_output)
        metrics.request_computed.observe(sequence.num_prompt_tokens - sequence.num_cached_tokens)
        metrics.params_max_tokens.observe(sequence.max_tokens)
        metrics.request_preemptions.observe(sequence.num_preemptions)
        metrics.queue_time.observe(sequence.scheduled_time - sequence.queued_time)
        if not num_output:
            return  # It failed in its first step, or gave an embedding: there are no times of tokens.
        first, last = sequence.first_token_time, sequence.last_token_time
        metrics.e2e.observe(last - sequence.arrival_time)
        metrics.inference_time.observe(last - sequence.scheduled_time)
        metrics.prefill_time.observe(first - sequence.scheduled_time)
        metrics.decode_time.observe(last - first)
        if num_output > 1:
            metrics.per_output_token.observe((last - first) / (num_output - 1))

    # For the engine's owner

    def tell_load(self, load: EngineLoad, totals: SchedulerStats) -> None:
        """The engine's state now; after every step, and when requests came or left."""
        metrics = self.metrics
        num_used = self._num_blocks - load.num_free_blocks
        usage = num_used / self._num_blocks
        with metrics.lock:
            metrics.running.set(load.num_running)
            metrics.waiting.set(load.num_waiting)
            metrics.waiting_by_reason.set(load.num_waiting - load.num_deferred, "capacity")
            metrics.waiting_by_reason.set(load.num_deferred, "deferred")
            metrics.kv_usage.set(usage)
            metrics.kv_blocks.set(num_used, "used")
            metrics.kv_blocks.set(load.num_free_cached_blocks, "cached")
            metrics.kv_blocks.set(load.num_free_blocks - load.num_free_cached_blocks, "free")
            metrics.preemptions.set_total(totals.num_preemptions)
            metrics.oom_steps.set_total(totals.num_oom_steps)
            metrics.prefix_queries.set_total(totals.prefix_cache_queries)
            metrics.prefix_hits.set_total(totals.prefix_cache_hits)
        self._log.write_when_due(load, usage, totals)

    def tell_death(self, reason: str) -> None:
        """The engine has stopped; `reason` is one of DEATHS."""
        with self.metrics.lock:
            self.metrics.deaths.inc(1, reason)


class ThroughputLog:
    """A line of the log every ten seconds in which steps ran, in vLLM's words. It is silent while nothing runs."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._now = 0.0
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self._queries = self._hits = 0

    def count(self, stats: StepStats) -> None:
        if self._since is None or stats.began - self._now > LOG_SECONDS:
            self._since = stats.began  # A pause is not part of an average.
            self._num_prompt_tokens = self._num_generated_tokens = 0
        self._now = stats.ended
        self._num_prompt_tokens += stats.num_prompt_tokens
        self._num_generated_tokens += stats.num_generated_tokens

    def write_when_due(self, load: EngineLoad, kv_usage: float, totals: SchedulerStats) -> None:
        if self._since is None or self._now - self._since < LOG_SECONDS:
            return
        seconds = self._now - self._since
        num_queries = totals.prefix_cache_queries - self._queries
        num_hits = totals.prefix_cache_hits - self._hits
        logger.info(
            "Engine 000: Avg prompt throughput: %.1f tokens/s, Avg generation throughput: %.1f tokens/s, "
            "Running: %d reqs, Waiting: %d reqs, GPU KV cache usage: %.1f%%, Prefix cache hit rate: %.1f%%",
            self._num_prompt_tokens / seconds,
            self._num_generated_tokens / seconds,
            load.num_running,
            load.num_waiting,
            100 * kv_usage,
            100 * num_hits / num_queries if num_queries else 0.0,
        )
        self._since = self._now
        self._num_prompt_tokens = self._num_generated_tokens = 0
        self._queries, self._hits = totals.prefix_cache_queries, totals.prefix_cache_hits
