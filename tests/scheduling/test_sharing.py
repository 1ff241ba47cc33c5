"""Shared blocks: prefix hits, their limits, isolation by salt, and siblings of one prompt."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from qengine.request import Request
from qengine.scheduling.admission import AdmissionPolicy
from qengine.scheduling.batch import Batch
from qengine.scheduling.block_pool import BlockPool
from qengine.scheduling.scheduler import Scheduler, SchedulerLimits
from tests.scheduling.fake_runner import FakeRunner, expected_output, make_request

MAX_MODEL_LEN = 128


class Bench:
    """A scheduler with the checking runner; remembers every request it was given."""

    def __init__(
        self, *, caching: bool = True, max_num_batched_tokens: int = 64, policy: AdmissionPolicy | None = None
    ) -> None:
        self.pool = BlockPool(64, 4)
        limits = SchedulerLimits(8, max_num_batched_tokens, MAX_MODEL_LEN)
        self.scheduler = Scheduler(limits, self.pool, enable_prefix_caching=caching, policy=policy)
        self.runner = FakeRunner(self.pool)
        self.requests: dict[str, Request] = {}

    def add(self, request: Request) -> Request:
        self.scheduler.add(request)
        self.requests[request.request_id] = request
        return request

    def step(self) -> Batch:
        batch = self.scheduler.schedule()
        self.scheduler.update(batch, self.runner.step(batch, self.requests))
        self.scheduler.check_integrity()
        return batch

    def drain(self) -> None:
        while self.scheduler.has_unfinished:
            self.step()
        assert self.pool.num_free == self.pool.num_blocks
        for request in self.requests.values():
            assert request.output_token_ids == expected_output(request, MAX_MODEL_LEN)

    def run(self, request: Request) -> Request:
        self.add(request)
        self.drain()
        return request


def test_full_blocks_are_found_again_and_only_the_rest_is_computed() -> None:
    bench = Bench()
    bench.run(make_request("a", range(14), max_tokens=1))
    bench.add(make_request("b", [*range(10), 99, 99, 99], max_tokens=1))
    entry = bench.step().entries[0]
    assert (entry.start, entry.num_tokens) == (8, 5)
    assert bench.requests["b"].num_cached_tokens == 8
    stats = bench.scheduler.stats
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (13 + 12, 8)


def test_a_whole_prompt_is_never_taken_from_the_cache() -> None:
    bench = Bench()
    bench.run(make_request("a", range(12), max_tokens=1))
    assert bench.run(make_request("b", range(12), max_tokens=1)).num_cached_tokens == 8
    assert bench.run(make_request("c", range(13), max_tokens=1)).num_cached_tokens == 12


def test_answers_are_found_by_the_next_turn_of_a_conversation() -> None:
    bench = Bench()
    first = bench.run(make_request("a", range(10), max_tokens=9))
    turn = [*first.prompt_token_ids, *first.output_token_ids, 1, 2, 3]
    # 18 of the 19 tokens were computed, in 4 full blocks.
    assert bench.run(make_request("b", turn, max_tokens=1)).num_cached_tokens == 16


def test_blocks_are_not_found_before_they_are_computed() -> None:
    bench = Bench(max_num_batched_tokens=16)
    bench.add(make_request("a", range(40), max_tokens=1))
    batch = bench.scheduler.schedule()
    assert bench.pool.num_cached == 0
    bench.scheduler.update(batch, bench.runner.step(batch, bench.requests))
    assert bench.pool.num_cached == 4
    bench.drain()


def test_an_aborted_prompt_leaves_what_it_computed() -> None:
    bench = Bench(max_num_batched_tokens=16)
    bench.add(make_request("a", range(40), max_tokens=1))
    bench.step()
    batch = bench.scheduler.schedule()
    bench.scheduler.abort("a")
    assert bench.scheduler.update(batch, bench.runner.step(batch, bench.requests)) == []
    assert bench.pool.num_free == 64
    assert bench.pool.num_cached == 4


def test_without_prefix_caching_nothing_is_found() -> None:
    bench = Bench(caching=False)
    for name in "ab":
        assert bench.run(make_request(name, range(14), max_tokens=6)).num_cached_tokens == 0
    assert bench.pool.num_cached == 0
    assert bench.scheduler.stats.prefix_cache_queries == 0


def test_reset_forgets_the_past() -> None:
    bench = Bench()
    bench.run(make_request("a", range(14), max_tokens=1))
    bench.scheduler.reset_prefix_cache()
    assert bench.run(make_request("b", range(14), max_tokens=1)).num_cached_tokens == 0
    assert bench.run(make_request("c", range(14), max_tokens=1)).num_cached_tokens == 12


def test_salts_do_not_see_each_other() -> None:
    bench = Bench()
    prompt = range(42)
    hits = {}
    for index, salt in enumerate(["", "key-1", "key-2", "key-1", "", "key-2"]):
        request = bench.run(make_request(f"r{index}", prompt, max_tokens=1, salt=salt))
        hits.setdefault(salt, []).append(request.num_cached_tokens)
    assert hits == {"": [0, 40], "key-1": [0, 40], "key-2": [0, 40]}


# ---- siblings


@pytest.mark.parametrize("caching", [True, False])
def test_siblings_wait_for_the_prompt_and_share_its_blocks(caching: bool) -> None:
    bench = Bench(caching=caching, max_num_batched_tokens=16)
    leader = bench.add(make_request("a", range(30), max_tokens=5))
    followers = [bench.add(make_request(f"a{i}", range(30), max_tokens=5, seed=i, follows=leader)) for i in (1, 2)]
    other = bench.add(make_request("b", range(50, 52), max_tokens=5))
    assert [entry.request_id for entry in bench.step().entries] == ["a"]
    assert [(e.request_id, e.start, e.num_tokens) for e in bench.step().entries] == [("a", 16, 14), ("b", 0, 2)]
    assert bench.scheduler.snapshot().num_deferred == 0
    batch = bench.step()
    shares = {e.request_id: e for e in batch.entries}
    for follower in followers:
        assert (shares[follower.request_id].start, shares[follower.request_id].num_tokens) == (28, 2)
        assert follower.num_cached_tokens == 28
        assert shares[follower.request_id].block_ids[:7] == shares["a"].block_ids[:7]
        assert shares[follower.request_id].block_ids[7] != shares["a"].block_ids[7]
    assert other.num_cached_tokens == 0
    bench.drain()
    # A stranger with the same prompt finds it only if the cache is on.
    assert bench.run(make_request("c", range(30), max_tokens=1)).num_cached_tokens == (28 if caching else 0)


def test_shared_blocks_are_not_counted_on_to_become_free() -> None:
    seen: list[list[int]] = []

    class Recorder(AdmissionPolicy):
        def fits(self, num_used: int, sequences: Iterable[tuple[int, int]]) -> bool:
            seen.append([num_freed for _, num_freed in sequences])
            return True

    bench = Bench(policy=Recorder(64, 4))
    leader = bench.add(make_request("a", range(30), max_tokens=5))
    for index in (1, 2):
        bench.add(make_request(f"a{index}", range(30), max_tokens=5, seed=index, follows=leader))
    bench.drain()
    # Eight blocks each, seven of them shared; at first the leader has no reason to think so.
    assert seen == [[8, 1], [1, 1, 1]]


def test_a_follower_added_late_still_shares_without_prefix_caching() -> None:
    bench = Bench(caching=False)
    leader = bench.add(make_request("a", range(30), max_tokens=9))
    for _ in range(3):
        bench.step()
    late = bench.add(make_request("a1", range(30), max_tokens=9, seed=1, follows=leader))
    bench.drain()
    assert late.num_cached_tokens == 28


def test_groups_without_prefix_caching_do_not_see_each_other() -> None:
    bench = Bench(caching=False)
    for group in "ab":
        leader = bench.add(make_request(group, range(30), max_tokens=9))
        bench.add(make_request(f"{group}1", range(30), max_tokens=9, seed=1, follows=leader))
    bench.drain()
    cached = {name: request.num_cached_tokens for name, request in bench.requests.items()}
    assert cached == {"a": 0, "a1": 28, "b": 0, "b1": 28}


@pytest.mark.parametrize("moment", ["waiting", "between chunks", "in flight"])
def test_followers_go_on_when_their_leader_is_aborted(moment: str) -> None:
    bench = Bench(caching=False, max_num_batched_tokens=64 if moment == "in flight" else 16)
    leader = bench.add(make_request("a", range(30), max_tokens=5))
    follower = bench.add(make_request("a1", range(30), max_tokens=5, seed=1, follows=leader))
    if moment == "between chunks":
        bench.step()
    if moment == "in flight":
        batch = bench.scheduler.schedule()
        assert bench.scheduler.snapshot().num_deferred == 1
    bench.scheduler.abort("a")
    bench.scheduler.check_integrity()
    assert bench.scheduler.snapshot().num_deferred == 0
    if moment == "in flight":
        assert bench.scheduler.update(batch, bench.runner.step(batch, bench.requests)) == []
    del bench.requests["a"]
    bench.drain()
    assert follower.finish_reason == "length"


def test_a_deferred_follower_can_be_aborted() -> None:
    bench = Bench()
    leader = bench.add(make_request("a", range(30), max_tokens=5))
    for index in (1, 2):
        bench.add(make_request(f"a{index}", range(30), max_tokens=5, seed=index, follows=leader))
    batch = bench.scheduler.schedule()
    assert bench.scheduler.snapshot().num_deferred == 2
    for index, left in ((1, 1), (2, 0)):
        bench.scheduler.abort(f"a{index}")
        bench.scheduler.check_integrity()
        assert bench.scheduler.snapshot().num_deferred == left
        del bench.requests[f"a{index}"]
    bench.scheduler.update(batch, bench.runner.step(batch, bench.requests))
    bench.drain()


def test_a_prompt_without_a_full_block_keeps_no_sibling_waiting() -> None:
    bench = Bench()
    leader = bench.add(make_request("a", range(4), max_tokens=5))
    bench.add(make_request("a1", range(4), max_tokens=5, seed=1, follows=leader))
    assert len(bench.step().entries) == 2
    bench.drain()


# ---- prompt log-probabilities


def test_prompt_logprobs_skip_the_cache_cover_every_position_and_fill_the_cache() -> None:
    bench = Bench(max_num_batched_tokens=8)
    bench.run(make_request("a", range(20), max_tokens=1))
    request = bench.add(make_request("b", range(20), max_tokens=3, prompt_logprobs=2))
    targets = []
    while bench.scheduler.has_unfinished:
        entry = bench.step().entries[0]
        targets.append(entry.prompt_targets)
        assert entry.num_prompt_logprobs == (2 if entry.prompt_targets else None)
    assert targets == [tuple(range(1, 9)), tuple(range(9, 17)), tuple(range(17, 20)), (), ()]
    assert request.num_cached_tokens == 0
    assert [record.token_id for record in request.prompt_logprobs] == list(range(1, 20))
    bench.scheduler.reset_prefix_cache()
    bench.run(make_request("c", range(20), max_tokens=1, prompt_logprobs=0))
    assert bench.run(make_request("d", range(20), max_tokens=1)).num_cached_tokens == 16


@pytest.mark.parametrize("num_steps", [1, 2, 3, 5])
def test_prompt_logprobs_are_not_collected_twice_after_a_preemption(num_steps: int) -> None:
    for caching in (True, False):
        bench = Bench(caching=caching, max_num_batched_tokens=7)
        request = bench.add(make_request("a", range(20), max_tokens=8, prompt_logprobs=1))
        for _ in range(num_steps):
            bench.step()
        bench.scheduler._preempt(bench.scheduler._live["a"])
        bench.scheduler.check_integrity()
        bench.drain()
        assert [record.token_id for record in request.prompt_logprobs] == list(range(1, 20))
        assert [-record.logprob for record in request.prompt_logprobs] == list(range(19))
        # What was computed before is found again up to the log-probabilities that are in.
        computed = {1: 7, 2: 14, 3: 20, 5: 22}[num_steps]
        assert bench.scheduler.stats.num_recomputed_tokens == (computed % 4 if caching else computed)


def test_blocks_that_survive_a_preemption_are_not_recomputed() -> None:
    bench = Bench()
    request = bench.add(make_request("a", range(18), max_tokens=9))
    for _ in range(4):
        bench.step()
    bench.scheduler._preempt(bench.scheduler._live["a"])
    bench.drain()
    # 21 tokens were computed, 20 of them in full blocks.
    assert bench.scheduler.stats.num_recomputed_tokens == 1
    assert request.num_cached_tokens == 0, "what a request finds of its own is no hit"
    assert bench.scheduler.stats.prefix_cache_hits == 0
