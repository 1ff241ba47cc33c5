"""Scheduler, behaviour by behaviour: what a step holds, who gets in, who is preempted, and how requests end."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterable

import pytest

from qengine.errors import ConfigError, RequestError
from qengine.request import Request
from qengine.scheduling.admission import AdmissionPolicy, GrowthForecast, OutputLengthForecast, peak_blocks
from qengine.scheduling.batch import Batch, SampledToken, StepResult
from qengine.scheduling.block_pool import BlockPool
from qengine.scheduling.scheduler import Scheduler, SchedulerLimits
from qengine.scheduling.tracking import Track
from qengine.scheduling.waiting import WaitingQueue
from tests.scheduling.fake_runner import make_request


class GreedyPolicy(AdmissionPolicy):
    """Keeps nothing back, so that preemption can be provoked."""

    def fits(self, num_used: int, sequences: Iterable[tuple[int, int]]) -> bool:
        return True


def make_scheduler(
    num_blocks: int = 64,
    block_size: int = 4,
    *,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 32,
    max_model_len: int = 128,
    caching: bool = False,
    greedy: bool = True,
) -> Scheduler:
    pool = BlockPool(num_blocks, block_size)
    limits = SchedulerLimits(max_num_seqs, max_num_batched_tokens, max_model_len)
    policy = GreedyPolicy(num_blocks, block_size) if greedy else None
    return Scheduler(limits, pool, enable_prefix_caching=caching, policy=policy)


def answer(batch: Batch, token_id: int = 1) -> StepResult:
    """The same token for every entry that samples."""
    return StepResult({entry.request_id: SampledToken(token_id) for entry in batch.entries if entry.sample is not None})


def step(scheduler: Scheduler, token_id: int = 1) -> tuple[Batch, list[Request]]:
    batch = scheduler.schedule()
    changed = scheduler.update(batch, answer(batch, token_id))
    scheduler.check_integrity()
    return batch, changed


def shape(batch: Batch) -> list[tuple[str, int, int, bool]]:
    return [(e.request_id, e.start, e.num_tokens, e.sample is not None) for e in batch.entries]


# ---- the step


def test_a_prompt_is_cut_to_the_budget_and_samples_with_its_last_token() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=10)
    scheduler.add(make_request("a", range(25), max_tokens=3))
    shapes = [shape(step(scheduler)[0]) for _ in range(5)]
    assert shapes == [
        [("a", 0, 10, False)],
        [("a", 10, 10, False)],
        [("a", 20, 5, True)],
        [("a", 25, 1, True)],
        [("a", 26, 1, True)],
    ]
    assert not scheduler.has_unfinished
    assert scheduler.schedule().entries == ()


def test_decodes_go_first_then_begun_prompts_then_new_ones() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=12)
    scheduler.add(make_request("long", range(30), max_tokens=9))
    scheduler.add(make_request("short", range(4), max_tokens=9))
    scheduler.add(make_request("last", range(4), max_tokens=9))
    assert shape(step(scheduler)[0]) == [("long", 0, 12, False)]
    assert shape(step(scheduler)[0]) == [("long", 12, 12, False)]
    assert shape(step(scheduler)[0]) == [("long", 24, 6, True), ("short", 0, 4, True), ("last", 0, 2, False)]
    scheduler.add(make_request("new", range(30), max_tokens=9))
    assert shape(step(scheduler)[0]) == [
        ("long", 30, 1, True),
        ("short", 4, 1, True),
        ("last", 2, 2, True),
        ("new", 0, 8, False),
    ]


def test_entries_carry_tokens_blocks_and_the_requests_own_sampling() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=6)
    request = make_request("a", [7, 8, 9, 10, 11, 12, 13], max_tokens=4, seed=5, eos=[3])
    scheduler.add(request)
    first, second = step(scheduler)[0].entries[0], step(scheduler, token_id=42)[0].entries[0]
    assert first.token_ids == (7, 8, 9, 10, 11, 12)
    assert second.token_ids == (13,)
    assert first.block_ids == tuple(request.block_ids)
    assert len(first.block_ids) == 2
    assert second.sample is not None
    assert (second.sample.params, second.sample.seed) == (request.params, 5)
    assert second.sample.eos_token_ids == {3}
    decode = scheduler.schedule().entries[0]
    assert (decode.token_ids, decode.start) == ((42,), 7)
    assert decode.sample is not None
    assert decode.sample.position == 8


def test_the_running_set_is_bounded_by_seqs_and_by_tokens() -> None:
    for limits in ({"max_num_seqs": 3}, {"max_num_batched_tokens": 3}):
        scheduler = make_scheduler(**limits)
        for index in range(5):
            scheduler.add(make_request(f"r{index}", [index], max_tokens=9))
        batch, _ = step(scheduler)
        assert [entry.request_id for entry in batch.entries] == ["r0", "r1", "r2"]
        assert (scheduler.num_running, scheduler.num_waiting) == (3, 2)
        scheduler.abort("r1")
        assert [entry.request_id for entry in step(scheduler)[0].entries] == ["r0", "r2", "r3"]


def test_a_lower_budget_for_one_step_and_a_discarded_step_lose_nothing() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=16)
    scheduler.add(make_request("a", range(20), max_tokens=2))
    batch = scheduler.schedule()
    assert shape(batch) == [("a", 0, 16, False)]
    scheduler.discard(batch)
    scheduler.check_integrity()
    batch = scheduler.schedule(max_num_tokens=8)
    assert shape(batch) == [("a", 0, 8, False)]
    scheduler.update(batch, answer(batch))
    assert shape(step(scheduler)[0]) == [("a", 8, 12, True)]


def test_steps_alternate() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", [1], max_tokens=4))
    batch = scheduler.schedule()
    with pytest.raises(AssertionError, match="before update"):
        scheduler.schedule()
    with pytest.raises(AssertionError, match="another batch"):
        scheduler.update(Batch(()), StepResult({}))
    scheduler.update(batch, answer(batch))
    with pytest.raises(AssertionError, match="without schedule"):
        scheduler.update(batch, answer(batch))


# ---- refusals


def test_a_prompt_that_fills_the_context_is_refused_with_both_numbers() -> None:
    scheduler = make_scheduler(max_model_len=16)
    with pytest.raises(RequestError, match=r"prompt has 16 tokens.*context of 16") as caught:
        scheduler.add(make_request("a", range(16)))
    assert (caught.value.param, caught.value.code) == ("prompt", "context_length_exceeded")
    scheduler.add(make_request("a", range(15), max_tokens=99))
    step(scheduler)
    assert not scheduler.has_unfinished, "one token of output fills the context"


def test_a_request_larger_than_the_pool_is_refused_at_once() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4)
    with pytest.raises(RequestError, match=r"10 prompt tokens and max_tokens of 8 need 5 KV blocks .* has 4") as caught:
        scheduler.add(make_request("a", range(10), max_tokens=8))
    assert (caught.value.param, caught.value.code) == ("max_tokens", "context_length_exceeded")
    assert not scheduler.has_unfinished
    # 17 tokens fit 16 slots: the last one is sampled and never computed.
    request = make_request("a", range(10), max_tokens=7)
    scheduler.add(request)
    while scheduler.has_unfinished:
        step(scheduler)
    assert (len(request.output_token_ids), request.num_preemptions) == (7, 0)


def test_an_empty_prompt_and_an_id_in_use_are_refused() -> None:
    scheduler = make_scheduler()
    with pytest.raises(RequestError, match="prompt is empty"):
        scheduler.add(make_request("a", []))
    scheduler.add(make_request("a", [1], max_tokens=1))
    with pytest.raises(RequestError, match="request_id 'a'") as caught:
        scheduler.add(make_request("a", [1]))
    assert caught.value.param == "request_id"
    step(scheduler)
    scheduler.add(make_request("a", [1], max_tokens=1))


@pytest.mark.parametrize("name", ["max_num_seqs", "max_num_batched_tokens", "max_model_len", "max_in_flight"])
def test_impossible_limits_are_refused(name: str) -> None:
    values = {"max_num_seqs": 1, "max_num_batched_tokens": 1, "max_model_len": 1, "max_in_flight": 1}
    with pytest.raises(ConfigError, match=f"{name} is 0"):
        SchedulerLimits(**{**values, name: 0})


def test_the_queue_is_in_order_of_arrival_but_for_the_preempted() -> None:
    queue = WaitingQueue()
    tracks = []
    for arrival, num_preemptions in ((4, 0), (1, 0), (3, 1), (2, 0), (5, 2)):
        request = make_request(f"r{arrival}", [1])
        request.num_preemptions = num_preemptions
        tracks.append(Track(request, arrival, worst_blocks=1, forecast=GrowthForecast(arrival, 4)))
        queue.push(tracks[-1])
    queue.remove(tracks[0])
    queue.check_integrity({})
    assert [queue.pop_head().arrival for _ in range(4)] == [3, 5, 1, 2]
    assert queue.head is None


# ---- ends


@pytest.mark.parametrize(
    ("params", "tokens", "reason", "stop_reason"),
    [
        ({}, [5, 5, 2], "stop", None),
        ({"stop_token_ids": [5]}, [5], "stop", 5),
        ({"stop_token_ids": [2]}, [2], "stop", None),
        ({"ignore_eos": True}, [2, 2, 2, 2], "length", None),
        ({"ignore_eos": True, "stop_token_ids": [2]}, [2], "stop", 2),
        ({"min_tokens": 3}, [2, 2, 2], "stop", None),
        ({"min_tokens": 2, "stop_token_ids": [7]}, [7, 7], "stop", 7),
        ({"min_tokens": 4, "stop_token_ids": [7]}, [7, 5, 5, 5], "length", None),
        ({}, [5, 5, 5, 2], "stop", None),
        ({}, [5, 5, 5, 5], "length", None),
    ],
)
def test_the_token_that_ends_a_request(
    params: dict[str, object], tokens: list[int], reason: str, stop_reason: int | None
) -> None:
    scheduler = make_scheduler()
    request = make_request("a", [1, 2], max_tokens=4, eos=[2], **params)
    scheduler.add(request)
    for index, token_id in enumerate(tokens):
        assert not request.finished, f"ended before token {index}"
        assert step(scheduler, token_id)[1] == [request]
    assert (request.finish_reason, request.stop_reason) == (reason, stop_reason)
    assert request.output_token_ids == tokens
    assert scheduler.pool.num_free == 64
    assert request.block_ids == []


def test_the_context_ends_a_request_before_max_tokens() -> None:
    scheduler = make_scheduler(max_model_len=6)
    request = make_request("a", [1, 2, 3], max_tokens=50)
    scheduler.add(request)
    while scheduler.has_unfinished:
        step(scheduler)
    assert (request.finish_reason, request.num_tokens) == ("length", 6)


def test_a_failed_request_ends_alone_and_leaves_nothing_in_the_cache() -> None:
    scheduler = make_scheduler(caching=True)
    bad, good = make_request("bad", range(9), max_tokens=4), make_request("good", range(20, 29), max_tokens=4)
    for request in (bad, good):
        scheduler.add(request)
    step(scheduler)
    batch = scheduler.schedule()
    sampled = {"good": SampledToken(1)}
    assert scheduler.update(batch, StepResult(sampled, failed={"bad": "NaN in the logits"})) == [bad, good]
    assert (bad.finish_reason, bad.error, len(bad.output_token_ids)) == ("error", "NaN in the logits", 1)
    assert not good.finished
    scheduler.check_integrity()
    again = make_request("again", range(9), max_tokens=1)
    scheduler.add(again)
    step(scheduler)
    assert again.num_cached_tokens == 0


def test_finish_sets_the_reason_it_is_given() -> None:
    scheduler = make_scheduler()
    request = make_request("a", [1, 2], max_tokens=9)
    scheduler.add(request)
    step(scheduler)
    assert scheduler.finish("a", "stop", "###") is request
    assert (request.finish_reason, request.stop_reason) == ("stop", "###")
    assert scheduler.finish("a", "stop", "###") is None
    assert not scheduler.has_unfinished


# ---- abort at any moment


@pytest.mark.parametrize("moment", ["waiting", "between chunks", "decoding", "in flight"])
def test_abort_frees_everything_as_soon_as_no_step_has_it(moment: str) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    request = make_request("a", range(20), max_tokens=9)
    scheduler.add(request)
    for _ in range({"waiting": 0, "between chunks": 1, "decoding": 4, "in flight": 4}[moment]):
        step(scheduler)
    num_output = len(request.output_token_ids)
    batch = scheduler.schedule() if moment == "in flight" else None
    assert scheduler.abort("a") is request
    assert request.finish_reason == "abort"
    assert not scheduler.has_unfinished
    scheduler.check_integrity()
    if batch is not None:
        assert scheduler.pool.num_free == 64 - 6
        assert scheduler.update(batch, answer(batch)) == []
        scheduler.check_integrity()
    assert scheduler.pool.num_free == 64
    assert len(request.output_token_ids) == num_output
    assert scheduler.abort("a") is None


def test_a_result_in_flight_is_not_given_to_a_new_request_of_the_same_id() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", [1, 2], max_tokens=9))
    batch = scheduler.schedule()
    scheduler.abort("a")
    reborn = make_request("a", [1, 2], max_tokens=9)
    scheduler.add(reborn)
    assert scheduler.update(batch, answer(batch)) == []
    assert reborn.output_token_ids == []
    scheduler.check_integrity()


# ---- admission and preemption


def test_peak_blocks_plays_the_batch_forward() -> None:
    """Against a simulation that adds 1/block_size of a block per live sequence and step."""
    rng = random.Random(3)
    for _ in range(50):
        block_size = rng.choice([1, 4, 16])
        sequences = [(rng.randrange(1, 60), rng.randrange(0, 12)) for _ in range(rng.randrange(1, 9))]
        used = sum(held for _, held in sequences) + 3
        highest = float(used)
        for now in range(1, 61):
            growing = sum(now for remaining, _ in sequences if remaining >= now) / block_size
            highest = max(highest, used - sum(held for remaining, held in sequences if remaining < now) + growing)
        assert peak_blocks(used, sequences, block_size) == pytest.approx(highest)


def test_lengths_are_forecast_from_what_was_seen_lately() -> None:
    lengths = OutputLengthForecast()
    for _ in range(2):
        for length in range(1, 1025):
            lengths.observe(length)
    assert lengths.predict(0, 0.5) == 513, "the guess from before any traffic is gone"
    assert lengths.predict(512, 0.5) == 769, "only answers longer than what is there count"
    assert lengths.predict(1024, 0.5) == 2048, "past everything seen it doubles"
    forecasts = [GrowthForecast(arrival, 10_000).remaining(0, lengths) for arrival in range(200)]
    assert sum(forecasts) / 200 == pytest.approx(512, rel=0.02), "requests spread evenly over the quantiles"
    outlived = GrowthForecast(1, 600)
    assert all(1 <= outlived.remaining(done, lengths) <= 600 - done for done in range(600))


def test_the_margin_follows_the_cost_of_preemption() -> None:
    policy = AdmissionPolicy(num_blocks=100, block_size=16)
    assert policy.fits(100, [])
    policy.on_preempted(400)
    assert 90 < 100 - policy.margin < 100
    assert not policy.fits(100, [])
    policy.on_computed(400)
    assert policy.margin > 0, "as many tokens as were lost do not pay for them"
    policy.on_computed(400 * 50)
    assert policy.margin == 0
    for _ in range(100):
        policy.on_preempted(400)
    assert policy.margin == 25


def test_the_whole_prompt_must_fit_and_nobody_overtakes() -> None:
    scheduler = make_scheduler(num_blocks=10, block_size=4, max_num_batched_tokens=64)
    scheduler.add(make_request("first", range(24), max_tokens=2))
    scheduler.add(make_request("large", range(20), max_tokens=2))
    scheduler.add(make_request("small", range(4), max_tokens=2))
    steps = []
    while scheduler.has_unfinished:
        steps.append([entry.request_id for entry in step(scheduler)[0].entries])
    # Four blocks stay free beside the first prompt: enough for the small one, but it is not its turn.
    assert steps == [["first"], ["first"], ["large", "small"], ["large", "small"]]


def test_a_reserve_for_decoding_is_kept_once_lengths_are_known() -> None:
    scheduler = make_scheduler(
        num_blocks=100, block_size=4, max_num_batched_tokens=1000, max_num_seqs=100, greedy=False
    )
    for index in range(300):
        scheduler.add(make_request(f"r{index}", [1, 2, 3, 4], max_tokens=16))
    while scheduler.has_unfinished:
        step(scheduler)
    before = scheduler.stats.num_preemptions
    for index in range(100):
        scheduler.add(make_request(f"s{index}", [1, 2, 3, 4], max_tokens=16))
    step(scheduler)
    # 100 prompts of one block would fit, but each grows to five blocks: 20 fill the pool.
    assert 15 <= scheduler.num_running <= 20
    while scheduler.has_unfinished:
        step(scheduler)
    assert scheduler.stats.num_preemptions == before


def test_the_last_admitted_is_preempted_keeps_its_tokens_and_comes_back_first() -> None:
    scheduler = make_scheduler(num_blocks=6, block_size=4, max_num_seqs=2)
    old, young = make_request("old", range(8), max_tokens=9), make_request("young", range(8), max_tokens=9)
    third = make_request("third", [1], max_tokens=3)
    for request in (old, young, third):
        scheduler.add(request)
    while not young.num_preemptions:
        step(scheduler)
    assert (old.num_preemptions, scheduler.stats.num_preemptions) == (0, 1)
    kept = list(young.output_token_ids)
    assert len(kept) == 5
    assert (young.num_computed_tokens, young.block_ids) == (0, [])
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 2)
    while not old.finished:
        step(scheduler)
    batch, _ = step(scheduler)
    assert shape(batch)[0] == ("young", 0, 13, True)
    assert young.output_token_ids[:5] == kept
    assert scheduler.stats.num_recomputed_tokens == 12
    while scheduler.has_unfinished:
        step(scheduler)
    assert len(young.output_token_ids) == 9


def test_those_preempted_before_are_spared() -> None:
    scheduler = make_scheduler(num_blocks=9, block_size=4)
    requests = [make_request(name, range(8), max_tokens=16) for name in "xyz"]
    for request in requests:
        scheduler.add(request)
    step(scheduler)
    scheduler._preempt(scheduler._live["z"])
    while scheduler.stats.num_preemptions == 1:
        step(scheduler)
    assert [request.num_preemptions for request in requests] == [0, 1, 1]


def test_preempted_twice_a_request_is_protected() -> None:
    scheduler = make_scheduler(num_blocks=12, block_size=1, max_num_seqs=4)
    requests = [make_request(f"r{index}", [1, 2], max_tokens=10) for index in range(12)]
    for request in requests:
        scheduler.add(request)
    reserved = []
    while scheduler.has_unfinished:
        step(scheduler)
        reserved.append(scheduler.snapshot().num_reserved_blocks)
    assert max(request.num_preemptions for request in requests) == 2
    assert max(reserved) > 0
    assert all(len(request.output_token_ids) == 10 for request in requests)


def test_the_snapshot_tells_what_is_there() -> None:
    scheduler = make_scheduler(num_blocks=10, block_size=4, max_num_seqs=1)
    scheduler.add(make_request("a", range(8), max_tokens=9))
    scheduler.add(make_request("b", range(8), max_tokens=9))
    step(scheduler)
    snapshot = scheduler.snapshot()
    assert (snapshot.num_running, snapshot.num_waiting, snapshot.num_deferred) == (1, 1, 0)
    assert snapshot.kv_usage == pytest.approx(0.2)
    assert snapshot.stats.num_scheduled_tokens == 8
    step(scheduler)
    assert snapshot.stats.num_scheduled_tokens == 8, "a snapshot does not move"


def test_the_scheduler_needs_no_torch() -> None:
    code = "import sys, qengine.scheduling.scheduler; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)
