"""Steps that run out of memory: the next ones are smaller, some are preempted, one gives way, and all gets better."""

from __future__ import annotations

from qengine.scheduling.pressure import MemoryPressure
from tests.scheduling.test_scheduler import answer, make_request, make_scheduler, step


def test_budgets_halve_and_come_back() -> None:
    pressure = MemoryPressure(64)
    assert not pressure.on_failed(40)
    assert pressure.budget == 20
    assert not pressure.on_failed(20)
    pressure.on_run()
    assert pressure.budget == 10
    for _ in range(100):
        pressure.on_run()
    assert pressure.budget == 64


def test_every_third_failure_in_a_row_costs_a_request() -> None:
    pressure = MemoryPressure(64)
    assert [pressure.on_failed(64) for _ in range(6)] == [False, False, True, False, False, True]
    pressure.on_run()
    assert [pressure.on_failed(64) for _ in range(3)] == [False, False, True]


def test_it_is_hopeless_only_when_single_tokens_of_several_requests_fail() -> None:
    pressure = MemoryPressure(8)
    for _ in range(30):
        pressure.on_failed(8)
    assert not pressure.is_hopeless
    for _ in range(6):
        pressure.on_failed(1)
    pressure.on_run()
    for _ in range(8):
        pressure.on_failed(1)
    assert not pressure.is_hopeless
    pressure.on_failed(1)
    assert pressure.is_hopeless


def test_a_failed_step_is_run_again_with_half_of_its_tokens_and_sequences() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=64, max_num_seqs=8)
    for index in range(8):
        scheduler.add(make_request(f"r{index}", [index], max_tokens=9))
    step(scheduler)
    batch = scheduler.schedule()
    assert batch.num_tokens == 8
    assert scheduler.back_off(batch) is None
    scheduler.check_integrity()
    assert (scheduler.num_running, scheduler.stats.num_preemptions, scheduler.stats.num_oom_steps) == (4, 4, 1)
    again = scheduler.schedule()
    assert [entry.request_id for entry in again.entries] == ["r0", "r1", "r2", "r3"]
    scheduler.update(again, answer(again))
    while scheduler.has_unfinished:
        step(scheduler)
    assert scheduler.stats.num_preemptions == 4


def test_a_long_prompt_is_cut_smaller_and_nobody_is_preempted() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=16)
    scheduler.add(make_request("a", range(20), max_tokens=2))
    assert scheduler.back_off(scheduler.schedule()) is None
    assert scheduler.schedule().num_tokens == 8
    assert scheduler.stats.num_preemptions == 0


def test_the_largest_of_those_that_kept_failing_gives_way() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=64, max_num_seqs=8)
    for index in range(8):
        scheduler.add(make_request(f"r{index}", range(3 + (index == 1)), max_tokens=9))
    step(scheduler)
    assert [scheduler.back_off(scheduler.schedule()) for _ in range(2)] == [None, None]
    failed = scheduler.back_off(scheduler.schedule())
    scheduler.check_integrity()
    assert failed is not None
    assert (failed.request_id, failed.finish_reason, failed.error_code) == ("r1", "error", "out_of_memory")
    others = scheduler.num_running + scheduler.num_waiting
    assert others == 7
    while scheduler.has_unfinished:
        step(scheduler)
