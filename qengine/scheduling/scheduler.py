"""Scheduler: which tokens of which requests the next step computes, and in which blocks. No phases, no torch.

Every request has computed tokens that catch up with its known tokens; decode, chunked prefill, prefix hits and
recomputation after preemption are that one sum. Each step is a `schedule`, a run, and an `update`, or it is taken back
by `discard` or `back_off`. Up to `max_in_flight` steps may be between the first and the last, whose results come in the
order they were begun. A request whose next token is awaited sits out; the parts of a long prompt follow each other
without waiting.

Invariant (no deadlock, no starvation): with nothing in flight every step computes at least one token, for the free
blocks always cover what is promised to protected requests, a request that runs alone cannot lack a block, and with
nothing running the head of the queue fits, as no request larger than the pool is let in. A request is preempted at most
twice and the queue keeps the order of arrival, so the work before any request is finite and each one ends.
It neither runs models nor detokenizes, and is not thread-safe: its owner calls it from one place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from qengine.errors import GrammarError, RequestError
from qengine.request import GRAMMAR_FAILED, OUT_OF_MEMORY, FinishReason, Request
from qengine.scheduling.admission import AdmissionPolicy, GrowthForecast
from qengine.scheduling.batch import Batch, BatchEntry, StepResult
from qengine.scheduling.block_pool import BlockPool
from qengine.scheduling.flights import Flights
from qengine.scheduling.prefix_cache import PrefixCache
from qengine.scheduling.pressure import MemoryPressure
from qengine.scheduling.records import SchedulerLimits, SchedulerSnapshot, SchedulerStats
from qengine.scheduling.running import RunningSet
from qengine.scheduling.tracking import MAX_PREEMPTIONS, Track, end_after_token
from qengine.scheduling.waiting import WaitingQueue

__all__ = ["Scheduler", "SchedulerLimits", "SchedulerSnapshot", "SchedulerStats"]


class Scheduler:
    """Continuous batching over a block pool; the single owner of requests from `add` to their end."""

    def __init__(
        self,
        limits: SchedulerLimits,
        pool: BlockPool,
        *,
        enable_prefix_caching: bool = True,
        policy: AdmissionPolicy | None = None,
    ) -> None:
        self.limits = limits
        self.pool = pool
        self.stats = SchedulerStats()
        #: Requests that the last `schedule` gave blocks to, those that come back after a preemption among them.
        self.admitted: list[Request] = []
        self._policy = policy or AdmissionPolicy(pool.num_blocks, pool.block_size)
        self._prefix_cache = PrefixCache(pool, enabled=enable_prefix_caching)
        self._live: dict[str, Track] = {}
        self._waiting = WaitingQueue()
        self._flights = Flights(pool, limits.max_in_flight)
        self._running = RunningSet(pool, self._flights)
        self._pressure = MemoryPressure(limits.max_num_batched_tokens)
        self._num_arrivals = 0
        self._num_steps = 0

    # ---- requests in and out

    def add(self, request: Request) -> None:
        """Take a request over.

        Raises:
            RequestError: if its id is in use, its prompt is empty or fills the context, or it is larger than the pool.
        """
        assert not request.finished, "a request is added fresh"
        leader = self._live_leader(request)
        worst_blocks = self._check_admissible(request)
        self._num_arrivals += 1
        max_output_len = max(0, min(request.max_tokens, self.limits.max_model_len - request.num_prompt_tokens))
        track = Track(
            request=request,
            arrival=self._num_arrivals,
            worst_blocks=worst_blocks,
            forecast=GrowthForecast(self._num_arrivals, max_output_len),
        )
        self._prefix_cache.start(track, leader)
        self._live[request.request_id] = track
        self._waiting.push(track)

    def abort(self, request_id: str) -> Request | None:
        """End a request at any moment; a step in flight for it is ignored. None if no such request is live."""
        return self.finish(request_id, "abort")

    def finish(self, request_id: str, reason: FinishReason, stop_reason: int | str | None = None) -> Request | None:
        """End a request for a reason found outside (a stop string). None if no such request is live."""
        track = self._live.get(request_id)
        if track is None:
            return None
        self._end(track, reason, stop_reason)
        return track.request

    @property
    def has_unfinished(self) -> bool:
        return bool(self._live)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_deferred(self) -> int:
        return self._waiting.num_deferred

    def waiting(self) -> Iterator[Request]:
        """The requests that hold no blocks, in the order in which they will be admitted; deferred ones come last."""
        return (track.request for track in self._waiting)

    @property
    def num_in_flight(self) -> int:
        """Steps whose results are not in yet."""
        return len(self._flights)

    def snapshot(self) -> SchedulerSnapshot:
        """State for metrics, in O(1)."""
        return SchedulerSnapshot(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_deferred=self._waiting.num_deferred,
            kv_usage=self.pool.usage,
            num_reserved_blocks=self._running.num_reserved,
            stats=replace(self.stats),
        )

    def reset_prefix_cache(self) -> None:
        """Match nothing computed so far again; running requests go on undisturbed."""
        self.pool.reset_prefix_cache()

    def _check_admissible(self, request: Request) -> int:
        """Refuse what can never run; returns the blocks that the request holds at most."""
        if request.request_id in self._live:
            raise RequestError(
                f"request_id {request.request_id!r} belongs to a request that is not finished; use another one",
                param="request_id",
            )
        num_prompt, max_len = request.num_prompt_tokens, self.limits.max_model_len
        if not num_prompt:
            raise RequestError("the prompt is empty, expected at least 1 token", param="prompt")
        if request.pooling is not None:
            return self._check_pooled(num_prompt)
        if num_prompt >= max_len:
            raise RequestError(
                f"the prompt has {num_prompt} tokens, but the context of {max_len} tokens must also hold at least "
                "1 token of output; shorten the prompt",
                param="prompt",
                code="context_length_exceeded",
            )
        # The last token of a sequence is sampled and never computed, so it needs no slot.
        worst_blocks = self.pool.num_blocks_for(min(request.max_total_tokens, max_len) - 1)
        if worst_blocks > self.pool.num_blocks:
            raise RequestError(
                f"{num_prompt} prompt tokens and max_tokens of {request.max_tokens} need {worst_blocks} KV blocks of "
                f"{self.pool.block_size} tokens, but the whole KV cache has {self.pool.num_blocks}; lower max_tokens, "
                "shorten the prompt, or start the engine with more memory for the KV cache",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return worst_blocks

    def _check_pooled(self, num_prompt: int) -> int:
        """The same for a request that is only read: it needs no room for output."""
        num_blocks, max_len = self.pool.num_blocks_for(num_prompt), self.limits.max_model_len
        if num_prompt > max_len or num_blocks > self.pool.num_blocks:
            raise RequestError(
                f"the text has {num_prompt} tokens, but the context holds {max_len} and the KV cache "
                f"{self.pool.num_blocks * self.pool.block_size}; shorten the text",
                param="prompt",
                code="context_length_exceeded",
            )
        return num_blocks

    def _live_leader(self, request: Request) -> Track | None:
        """The sibling that a request follows, unless it has ended."""
        if request.follows is None or request.follows.finished:
            return None
        leader = self._live.get(request.follows.request_id)
        assert leader is not None, "a follower is added after its leader"
        assert leader.request is request.follows, "a follower's leader was replaced"
        return leader

    # ---- the step

    def schedule(self, max_num_tokens: int | None = None) -> Batch:
        """Choose the next step: decodes, then prompts begun, then new requests, each in order of admission.

        Args:
            max_num_tokens: a lower token budget for this step alone.

        Returns:
            The batch; empty only if nothing is unfinished, or all that is waits for a step in flight.
        """
        assert self._flights.has_room, "schedule() before update() or discard() of a step before"
        self.admitted = []
        budget = self._pressure.budget
        if max_num_tokens is not None:
            budget = max(1, min(budget, max_num_tokens))
        self._num_steps += 1
        entries: list[BatchEntry] = []
        tracks: list[Track] = []
        for track in self._in_turn():
            if budget:
                budget -= self._plan(track, budget, entries, tracks)
        while budget and (admitted := self._try_admit_head()) is not None:
            budget -= self._plan(admitted, budget, entries, tracks)
        assert entries or not self._live or len(self._flights), (
            "nothing can be scheduled although requests are unfinished"
        )
        batch = Batch(tuple(entries))
        self._policy.on_computed(batch.num_tokens)
        self._flights.begin(batch, tracks)
        return batch

    def update(self, batch: Batch, result: StepResult) -> list[Request]:
        """Take in what a step computed.

        Args:
            batch: the oldest one in flight.
            result: for each entry its token, if it samples, or the reason for which it failed.

        Returns:
            The requests that got a token or ended, in batch order. Those ended meanwhile are left out.
        """
        changed = []
        self._pressure.on_run()
        for entry, track in zip(batch.entries, self._flights.land(batch), strict=True):
            if track.request.finished:
                continue
            if entry.request_id in result.failed:
                self._fail(track, result.failed[entry.request_id])
                changed.append(track.request)
                continue
            self._advance(track, entry, result)
            if entry.sample is not None:
                self._accept_token(track, result)
                changed.append(track.request)
            elif entry.pool is not None:
                track.request.pooled.append(result.pooled[entry.request_id])
                if entry.context_len == track.request.num_tokens:
                    self._end(track, "stop")
                    changed.append(track.request)
        return changed

    def discard(self, batch: Batch) -> None:
        """Forget the newest step, which did not run: its tokens stay to be computed, its requests keep their blocks."""
        self._take_back(batch)

    def back_off(self, batch: Batch) -> Request | None:
        """Take back the newest step, for which there was no memory, so that the next one is smaller.

        Memory goes with tokens and with sequences: the budget is halved, and of several sequences that run those
        admitted last are preempted, half of them if they may be. If steps go on to fail, the largest request of the
        last one ends with an error, since what remains may fit without it.

        Returns:
            The request that had to end, if any.
        """
        tracks = [track for track in self._take_back(batch) if not track.request.finished]
        self.stats.num_oom_steps += 1
        gives_way = self._pressure.on_failed(batch.num_tokens)
        if gives_way and tracks:
            largest = max(tracks, key=lambda track: track.request.num_tokens)
            largest.request.error = "there is not enough memory to compute it"
            largest.request.error_code = OUT_OF_MEMORY
            self._end(largest, "error")
            return largest.request
        if len(tracks) > 1:
            self._shed(len(self._running) // 2)
        return None

    @property
    def is_starved(self) -> bool:
        """Whether not even the smallest step can be run, whichever request it is for."""
        return self._pressure.is_hopeless

    def _take_back(self, batch: Batch) -> Sequence[Track]:
        tracks = self._flights.cancel(batch)
        for entry, track in zip(batch.entries, tracks, strict=True):
            if track.running:
                track.num_planned = entry.start
        return tracks

    def _shed(self, num_left: int) -> None:
        """Preempt requests until so many run, but for those that may not be."""
        while len(self._running) > num_left:
            victim = self._running.victim()
            if victim is None or victim.num_flights:
                return
            self._preempt(victim)

    def _in_turn(self) -> list[Track]:
        """Running requests that this step can go on with: those with one token to compute, then the others.

        Each in order of admission. With several steps in flight a step takes only its share of those with one token,
        the ones that have waited longest, so that the steps after it have some too.
        """
        ready = [track for track in list(self._running) if track.running and self._try_make_room(track)]
        decodes: list[Track] = []
        partial: list[Track] = []
        for track in ready:
            if track.running:  # It may have had to make room for another.
                (decodes if track.num_remaining == 1 else partial).append(track)
        if self.limits.max_in_flight > 1:
            decodes.sort(key=lambda track: track.num_turn)
            decodes = decodes[: -(-len(self._running) // self.limits.max_in_flight)]
        return decodes + partial

    def _plan(self, track: Track, budget: int, entries: list[BatchEntry], tracks: list[Track]) -> int:
        """Append a track's entry, cut to the budget; returns its number of tokens."""
        num_tokens = min(track.num_remaining, budget)
        entry = track.entry(num_tokens)
        entries.append(entry)
        tracks.append(track)
        track.num_planned = entry.context_len
        track.num_turn = self._num_steps
        self.stats.num_scheduled_tokens += num_tokens
        if entry.start < track.high_water:
            self.stats.num_recomputed_tokens += min(entry.context_len, track.high_water) - entry.start
        return num_tokens

    def _try_make_room(self, track: Track) -> bool:
        """Give a running request the blocks that its known tokens need, if need be from others or by preempting it.

        Returns:
            Whether a step can go on with it: not while its next token is awaited, nor before the request whose blocks
            it needs has landed.
        """
        if not track.num_remaining:
            return False
        while not self._running.try_grow(track):
            victim = self._running.victim()
            assert victim is not None, "a protected request lacks a block"
            if victim.num_flights:
                return False
            self._preempt(victim)
            if victim is track:
                return False
        return True

    def _preempt(self, track: Track) -> None:
        """Take a request's blocks; it keeps its tokens and computes them again from the front of the queue."""
        request = track.request
        self._policy.on_preempted(request.num_computed_tokens)
        self._running.release(track)
        request.num_computed_tokens = track.num_planned = 0
        request.pooled.clear()
        request.num_preemptions += 1
        self.stats.num_preemptions += 1
        self._waiting.push(track)

    # ---- admission

    def _try_admit_head(self) -> Track | None:
        """Admit the first waiting request that waits for no leader, if it fits."""
        if len(self._running) >= self.limits.max_num_running:
            return None
        while (track := self._waiting.head) is not None:
            leader = self._live_leader(track.request)
            if leader is not None and self._prefix_cache.must_wait_for(leader, track):
                self._waiting.defer_head(leader.request.request_id)
                continue
            cached = self._prefix_cache.match(track)
            if not self._fits(track, cached):
                return None
            self._waiting.pop_head()
            self._admit(track, cached, leader)
            return track
        return None

    def _fits(self, track: Track, cached: list[int]) -> bool:
        """Whether a request's known tokens fit beside what runs, and what all of them will grow by.

        A protected request must fit with the most it can ever need.
        """
        num_revived = self.pool.num_unreferenced(cached)
        num_available = self._running.num_available - num_revived
        if track.protected:
            return track.worst_blocks - len(cached) <= num_available
        num_new = self.pool.num_blocks_for(track.request.num_tokens) - len(cached)
        if num_new > num_available:
            return False
        if not self._running:
            return True
        growing = [
            (self._forecast(other), len(other.table) - other.num_shared)
            for other in self._running
            if not other.protected
        ]
        growing.append((self._forecast(track), num_new))
        return self._policy.fits(self.pool.num_blocks - num_available + num_new, growing)

    def _forecast(self, track: Track) -> int:
        return track.forecast.remaining(len(track.request.output_token_ids), self._policy.lengths)

    def _admit(self, track: Track, cached: list[int], leader: Track | None) -> None:
        request = track.request
        self._running.admit(track, cached)
        self.admitted.append(request)
        if leader is not None and leader.running:
            leader.num_shared = max(leader.num_shared, len(cached))
        if not request.num_preemptions:
            request.num_cached_tokens = request.num_computed_tokens
            self.stats.prefix_cache_hits += request.num_computed_tokens
            if track.root is not None:
                self.stats.prefix_cache_queries += track.max_cached_tokens

    # ---- results

    def _advance(self, track: Track, entry: BatchEntry, result: StepResult) -> None:
        """Count an entry's tokens as computed and take its prompt log-probabilities."""
        request = track.request
        request.num_computed_tokens = entry.context_len
        track.high_water = max(track.high_water, entry.context_len)
        if entry.prompt_targets:
            logprobs = result.prompt_logprobs[entry.request_id]
            assert len(logprobs) == len(entry.prompt_targets), "prompt_logprobs and prompt_targets differ in length"
            # After a preemption the first ones of the chunk may be in already.
            request.prompt_logprobs.extend(logprobs[len(request.prompt_logprobs) - entry.start :])
        self._prefix_cache.register_computed(track)
        if request.num_computed_tokens >= request.num_prompt_tokens:
            self._waiting.release(entry.request_id)

    def _accept_token(self, track: Track, result: StepResult) -> None:
        request = track.request
        sampled = result.sampled[request.request_id]
        request.output_token_ids.append(sampled.token_id)
        if sampled.logprobs is not None:
            request.output_logprobs.append(sampled.logprobs)
        try:
            if request.grammar is not None:
                request.grammar.accept(sampled.token_id)
        except GrammarError as error:
            # Its blocks hold what the model computed and are as good as any.
            request.error, request.error_code = str(error), GRAMMAR_FAILED
            self._end(track, "error")
            return
        end = end_after_token(track, self.limits.max_model_len)
        if end is not None:
            self._end(track, *end)

    def _fail(self, track: Track, error: str) -> None:
        # Whatever broke this sequence may sit in its blocks: nobody is to find them again.
        self.pool.forget(track.table)
        track.request.error = error
        self._end(track, "error")

    def _end(self, track: Track, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        request = track.request
        if track.running:
            self._running.release(track)
        else:
            self._waiting.remove(track)
        del self._live[request.request_id]
        request.finish_reason = reason
        request.stop_reason = stop_reason
        if request.pooling is None:
            self._policy.on_ended(len(request.output_token_ids))
        self._waiting.release(request.request_id)

    # ---- proof

    def check_integrity(self) -> None:
        """Assert every invariant of scheduler, queue, running set and pool. O(pool + tokens): for tests."""
        self._running.check_integrity()
        self._flights.check_integrity()
        self._waiting.check_integrity(self._live)
        running, waiting = list(self._running), list(self._waiting)
        assert {*running, *waiting} == {*self._live.values()}, "live requests are not those running and waiting"
        assert len(running) + len(waiting) == len(self._live), "a request is in two places"
        assert len(running) <= self.limits.max_num_running, "more requests run than may"
        for request_id, track in self._live.items():
            request = track.request
            assert request.request_id == request_id, "a request is filed under another's id"
            assert not request.finished, "a finished request is live"
            assert request.num_preemptions <= MAX_PREEMPTIONS, "a request was preempted too often"
            assert request.num_computed_tokens < request.num_tokens, "a live request has nothing left to compute"
        for track in waiting:
            assert not track.running, "a waiting request runs"
            assert not track.request.block_ids, "a waiting request holds blocks"
            assert not track.request.num_computed_tokens, "a waiting request has computed tokens"
