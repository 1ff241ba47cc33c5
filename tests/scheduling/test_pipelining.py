"""Several steps in flight: who is in which, whose blocks are kept, and what is refused."""

from __future__ import annotations

import itertools
from collections import deque

import pytest

from qengine.scheduling.batch import Batch, SampledToken, StepResult
from qengine.scheduling.block_pool import BlockPool
from qengine.scheduling.scheduler import Scheduler, SchedulerLimits
from tests.scheduling.fake_runner import make_request
from tests.scheduling.test_random_walk import GreedyPolicy


def make_scheduler(num_blocks: int = 64, *, max_num_batched_tokens: int = 32, max_in_flight: int = 2) -> Scheduler:
    pool = BlockPool(num_blocks, block_size=4)
    limits = SchedulerLimits(8, max_num_batched_tokens, 128, max_in_flight)
    return Scheduler(limits, pool, enable_prefix_caching=False, policy=GreedyPolicy(num_blocks, 4))


def answer(batch: Batch) -> StepResult:
    return StepResult({entry.request_id: SampledToken(1) for entry in batch.entries if entry.sample is not None})


def ids(batch: Batch) -> list[str]:
    return [entry.request_id for entry in batch.entries]


def test_the_parts_of_a_prompt_follow_each_other_and_its_answer_waits() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=16, max_in_flight=3)
    scheduler.add(make_request("a", range(20), max_tokens=3))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert [(e.start, e.num_tokens, e.sample is not None) for e in (*first.entries, *second.entries)] == [
        (0, 16, False),
        (16, 4, True),
    ]
    awaited = scheduler.schedule()
    assert not awaited
    scheduler.discard(awaited)
    assert scheduler.update(first, answer(first)) == []
    assert not scheduler.schedule()
    scheduler.check_integrity()
    [request] = scheduler.update(second, answer(second))
    assert request.output_token_ids == [1]


def test_steps_in_flight_share_the_sequences_that_decode() -> None:
    scheduler = make_scheduler()
    for index in range(7):
        scheduler.add(make_request(f"r{index}", [index], max_tokens=40))
    batches = [scheduler.schedule(), scheduler.schedule()]
    assert [len(ids(batch)) for batch in batches] == [7, 0]
    in_flight = deque(batches)
    turns = []
    for _ in range(12):
        batch = in_flight.popleft()
        scheduler.update(batch, answer(batch))
        in_flight.append(scheduler.schedule())
        scheduler.check_integrity()
        turns.append(in_flight[-1])
    # From then on each step has its half, and nobody is left out of two turns in a row.
    assert all(len(ids(batch)) in (3, 4) for batch in turns[1:])
    for before, after in itertools.pairwise(turns[1:]):
        assert {*ids(before), *ids(after)} == {f"r{index}" for index in range(7)}


@pytest.mark.parametrize("ends_in", ["the first", "both"])
def test_blocks_stay_until_the_last_step_that_has_them_has_landed(ends_in: str) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=16)
    scheduler.add(make_request("a", range(32), max_tokens=3))
    first = scheduler.schedule()
    second = scheduler.schedule() if ends_in == "both" else None
    scheduler.abort("a")
    assert scheduler.pool.num_free == 64 - 8
    scheduler.update(first, answer(first))
    scheduler.check_integrity()
    if second is not None:
        assert scheduler.pool.num_free == 64 - 8
        assert scheduler.update(second, answer(second)) == []
    assert scheduler.pool.num_free == 64
    scheduler.check_integrity()


def test_whose_blocks_are_needed_lands_before_it_is_preempted() -> None:
    scheduler = make_scheduler(5)
    scheduler.add(make_request("old", range(8), max_tokens=9))
    first = scheduler.schedule()
    scheduler.add(make_request("young", range(11), max_tokens=2))
    second = scheduler.schedule()
    assert (ids(first), ids(second)) == (["old"], ["young"])
    [old] = scheduler.update(first, answer(first))
    # The old one needs a third block; the young one has it, and is in flight.
    stalled = scheduler.schedule()
    assert not stalled
    assert scheduler.stats.num_preemptions == 0
    scheduler.update(second, answer(second))
    scheduler.update(stalled, answer(stalled))
    assert ids(scheduler.schedule()) == ["old"]
    assert scheduler.stats.num_preemptions == 1
    scheduler.check_integrity()
    assert old.num_preemptions == 0


def test_results_come_in_order_and_only_the_newest_step_can_be_discarded() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=4)
    scheduler.add(make_request("a", range(20), max_tokens=3))
    first, second = scheduler.schedule(), scheduler.schedule()
    with pytest.raises(AssertionError, match="before update"):
        scheduler.schedule()
    with pytest.raises(AssertionError, match="oldest"):
        scheduler.update(second, answer(second))
    with pytest.raises(AssertionError, match="newest"):
        scheduler.discard(first)
    scheduler.discard(second)
    assert [entry.start for entry in scheduler.schedule().entries] == [4]
    scheduler.check_integrity()
