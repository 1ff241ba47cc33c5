"""Random walks over everything that can happen to a scheduler, at any moment, in tiny pools.

After every step all integrity checks run; the fake runner checks each KV slot that is read; at the end everything
drains and each request has exactly the tokens that it has with nobody else around. Steps are in flight one by one or
several at a time, as in a pipeline of devices, and then no step may write where one before it still reads or writes.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable

import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from qengine.errors import RequestError
from qengine.request import OUT_OF_MEMORY, Request
from qengine.scheduling.admission import AdmissionPolicy
from qengine.scheduling.batch import Batch, BatchEntry
from qengine.scheduling.block_pool import BlockPool
from qengine.scheduling.scheduler import Scheduler, SchedulerLimits
from tests.scheduling.fake_runner import FakeRunner, expected_output, make_request

MAX_MODEL_LEN = 24


class GreedyPolicy(AdmissionPolicy):
    """Keeps nothing back, so that preemption happens all the time."""

    def fits(self, num_used: int, sequences: Iterable[tuple[int, int]]) -> bool:
        return True


def slots(entry: BatchEntry, block_size: int, first: int) -> set[int]:
    """Slots of an entry's positions from `first` on."""
    return {entry.block_ids[p // block_size] * block_size + p % block_size for p in range(first, entry.context_len)}


def assert_apart(batch: Batch, earlier: Iterable[Batch], block_size: int) -> None:
    """No entry writes a slot that another request's entry touches in a step still in flight."""
    for entry in batch.entries:
        written = slots(entry, block_size, entry.start)
        for other in (other for before in earlier for other in before.entries):
            # The prompt's next part may follow its last one.
            touched = slots(other, block_size, 0)
            follows = other.request_id == entry.request_id and other.context_len <= entry.start
            assert follows or written.isdisjoint(touched), f"{entry.request_id} writes where {other.request_id} is"


class SchedulerWalk(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(4, 14),
        block_size=st.integers(1, 4),
        max_num_seqs=st.integers(1, 8),
        max_num_batched_tokens=st.integers(1, 16),
        caching=st.booleans(),
        greedy=st.booleans(),
        max_in_flight=st.sampled_from([1, 1, 2, 3]),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        caching: bool,
        greedy: bool,
        max_in_flight: int,
    ) -> None:
        self.pool = BlockPool(num_blocks, block_size)
        limits = SchedulerLimits(max_num_seqs, max_num_batched_tokens, MAX_MODEL_LEN, max_in_flight)
        policy = GreedyPolicy(num_blocks, block_size) if greedy else None
        self.scheduler = Scheduler(limits, self.pool, enable_prefix_caching=caching, policy=policy)
        self.runner = FakeRunner(self.pool)
        self.requests: dict[str, Request] = {}
        self.ended_outside: set[str] = set()
        self.in_flight: deque[Batch] = deque()

    # ---- requests in and out, at any moment

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=10),
        max_tokens=st.integers(1, 16),
        seed=st.integers(0, 1),
        salt=st.sampled_from(["", "other"]),
        eos=st.booleans(),
        num_prompt_logprobs=st.sampled_from([None, None, None, 0, 2]),
        num_followers=st.sampled_from([0, 0, 0, 1, 2]),
    )
    def add(
        self,
        prompt: list[int],
        max_tokens: int,
        seed: int,
        salt: str,
        eos: bool,
        num_prompt_logprobs: int | None,
        num_followers: int,
    ) -> None:
        leader: Request | None = None
        for index in range(1 + num_followers):
            request = make_request(
                f"r{len(self.requests)}",
                prompt,
                max_tokens=max_tokens,
                seed=seed + index,
                eos=range(10) if eos else (),
                salt=salt,
                follows=leader,
                prompt_logprobs=num_prompt_logprobs,
            )
            num_slots = self.pool.num_blocks * self.pool.block_size
            if min(len(prompt) + max_tokens, MAX_MODEL_LEN) - 1 > num_slots:
                with pytest.raises(RequestError, match="KV blocks"):
                    self.scheduler.add(request)
                return
            self.scheduler.add(request)
            self.requests[request.request_id] = request
            leader = leader or request

    def _pick(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.requests)))

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), stop=st.booleans())
    def end_outside(self, data: st.DataObject, stop: bool) -> None:
        request = self.requests[self._pick(data)]
        was_live = not request.finished
        request_id = request.request_id
        ended = self.scheduler.finish(request_id, "stop", "END") if stop else self.scheduler.abort(request_id)
        assert ended is (request if was_live else None)
        if was_live:
            self.ended_outside.add(request_id)
            assert (request.finish_reason, request.stop_reason) == (("stop", "END") if stop else ("abort", None))

    @rule()
    def reset_prefix_cache(self) -> None:
        self.scheduler.reset_prefix_cache()

    # ---- steps, in two halves so that everything above also happens in between

    @property
    def can_schedule(self) -> bool:
        return len(self.in_flight) < self.scheduler.limits.max_in_flight

    @precondition(lambda self: self.can_schedule)
    @rule(max_num_tokens=st.sampled_from([None, None, None, 1, 3]))
    def schedule(self, max_num_tokens: int | None) -> None:
        batch = self.scheduler.schedule(max_num_tokens)
        limit = max_num_tokens or self.scheduler.limits.max_num_batched_tokens
        assert batch.num_tokens <= limit
        assert not batch or self.scheduler.has_unfinished
        assert bool(batch) == self.scheduler.has_unfinished or self.in_flight
        assert_apart(batch, self.in_flight, self.pool.block_size)
        self.in_flight.append(batch)
        assert self.scheduler.num_in_flight == len(self.in_flight)

    @precondition(lambda self: self.in_flight)
    @rule()
    def update(self) -> None:
        self._run_oldest(None)

    @precondition(lambda self: self.in_flight and self.in_flight[0])
    @rule(data=st.data())
    def update_with_a_failure(self, data: st.DataObject) -> None:
        victim = data.draw(st.sampled_from([entry.request_id for entry in self.in_flight[0].entries]))
        if not self.requests[victim].finished:
            self.ended_outside.add(victim)
        self._run_oldest(victim)

    @precondition(lambda self: self.in_flight)
    @rule()
    def discard(self) -> None:
        self.scheduler.discard(self.in_flight.pop())

    @precondition(lambda self: self.in_flight and self.in_flight[-1])
    @rule()
    def run_out_of_memory(self) -> None:
        batch = self.in_flight.pop()
        failed = self.scheduler.back_off(batch)
        if failed is not None:
            assert failed.request_id in {entry.request_id for entry in batch.entries}
            assert (failed.finish_reason, failed.error_code) == ("error", OUT_OF_MEMORY)
            self.ended_outside.add(failed.request_id)

    @rule(num_steps=st.integers(2, 12))
    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self._fly()

    def _fly(self) -> None:
        """As the engine does: hand out as many steps as may be in flight, then take the oldest one in."""
        while self.can_schedule:
            self.schedule(None)
            self.scheduler.check_integrity()
        self._run_oldest(None)
        self.scheduler.check_integrity()

    def _run_oldest(self, failing: str | None) -> None:
        batch = self.in_flight.popleft()
        before = {request_id: len(request.output_token_ids) for request_id, request in self.requests.items()}
        alive = {entry.request_id for entry in batch.entries if not self.requests[entry.request_id].finished}
        result = self.runner.step(batch, self.requests, {failing: "NaN"} if failing else None)
        changed = self.scheduler.update(batch, result)
        expected = [
            entry.request_id
            for entry in batch.entries
            if entry.request_id in alive and (entry.sample is not None or entry.request_id == failing)
        ]
        assert [request.request_id for request in changed] == expected
        for request_id, request in self.requests.items():
            grown = request_id in expected and request_id != failing
            assert len(request.output_token_ids) == before[request_id] + grown
        if failing in alive:
            assert self.requests[failing].finish_reason == "error"
            assert self.requests[failing].error == "NaN"

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()

    # ---- the end

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        while self.in_flight:
            self._run_oldest(None)
        # One token a step is the least; each request is computed at most three times over.
        for _ in range(sum(3 * request.max_total_tokens for request in self.requests.values())):
            if not self.scheduler.has_unfinished:
                break
            self._fly()
        while self.in_flight:
            self._run_oldest(None)
        assert not self.scheduler.has_unfinished, "not everything drains"
        assert self.pool.num_free == self.pool.num_blocks
        for request in self.requests.values():
            self._check_answer(request)
        event(f"most preemptions of one request: {max((r.num_preemptions for r in self.requests.values()), default=0)}")

    def _check_answer(self, request: Request) -> None:
        assert request.num_preemptions <= 2
        expected = expected_output(request, MAX_MODEL_LEN)
        if request.request_id in self.ended_outside:
            assert request.output_token_ids == expected[: len(request.output_token_ids)]
            return
        assert request.output_token_ids == expected
        ended_by_eos = expected[-1] in request.eos_token_ids
        assert (request.finish_reason, request.stop_reason) == ("stop" if ended_by_eos else "length", None)
        if request.params.prompt_logprobs is not None:
            assert [record.token_id for record in request.prompt_logprobs] == request.prompt_token_ids[1:]
            positions = [-record.logprob for record in request.prompt_logprobs]
            assert positions == list(range(request.num_prompt_tokens - 1))


@pytest.mark.parametrize("max_in_flight", [1, 2, 3])
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("greedy", [True, False])
def test_a_crowded_pool_answers_everybody(caching: bool, greedy: bool, max_in_flight: int) -> None:
    """Long walks with a queue that never empties: preemption and protection are the normal case, if not prevented."""
    rng = random.Random(7)
    most_preempted, num_preemptions, num_reserved = 0, 0, 0
    for _ in range(10):
        pool = BlockPool(rng.randrange(8, 40), rng.randrange(1, 4))
        policy = GreedyPolicy(pool.num_blocks, pool.block_size) if greedy else None
        limits = SchedulerLimits(rng.randrange(4, 12), rng.randrange(4, 24), MAX_MODEL_LEN, max_in_flight)
        scheduler = Scheduler(limits, pool, enable_prefix_caching=caching, policy=policy)
        runner, requests = FakeRunner(pool), {}
        in_flight: deque[Batch] = deque()
        for _ in range(400 * max_in_flight):
            while scheduler.num_waiting < 3 and len(requests) < 60:
                prompt = [rng.randrange(2) for _ in range(rng.randrange(1, 8))]
                request = make_request(f"r{len(requests)}", prompt, max_tokens=rng.randrange(1, 17), eos=range(2))
                if request.max_total_tokens - 1 <= pool.num_blocks * pool.block_size:
                    scheduler.add(request)
                    requests[request.request_id] = request
            while len(in_flight) < max_in_flight:
                batch = scheduler.schedule()
                assert_apart(batch, in_flight, pool.block_size)
                in_flight.append(batch)
            scheduler.check_integrity()
            num_reserved = max(num_reserved, scheduler.snapshot().num_reserved_blocks)
            batch = in_flight.popleft()
            scheduler.update(batch, runner.step(batch, requests))
            scheduler.check_integrity()
        while in_flight:
            scheduler.discard(in_flight.pop())
        assert not scheduler.has_unfinished
        assert len(requests) == 60
        assert pool.num_free == pool.num_blocks
        for request in requests.values():
            assert request.output_token_ids == expected_output(request, MAX_MODEL_LEN)
            most_preempted = max(most_preempted, request.num_preemptions)
        num_preemptions += scheduler.stats.num_preemptions
    assert num_preemptions > 10
    assert most_preempted == 2 if greedy else most_preempted <= 2
    assert num_reserved > 0 or not greedy


TestSchedulerWalk = SchedulerWalk.TestCase
TestSchedulerWalk.settings = settings(max_examples=150, stateful_step_count=50, derandomize=True, deadline=None)
