"""AsyncEngine with the scripted engine: outputs, aborts, coalescing, death and shutdown."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from typing import Any

import pytest

from qengine.errors import EngineDeadError, RequestError
from qengine.request import RequestOutput, SamplingParams
from qengine.serving.admission import (
    Admission,
    NotAcceptingError,
    QueueFullError,
    QueueTimeoutError,
    RequestTimeoutError,
    ShutDownError,
)
from qengine.serving.async_engine import AsyncEngine, Timeouts
from tests.serving.scripted_engine import DIE_PROMPT, NAN_PROMPT, NEVER_FITS_PROMPT, SCRIPT, ScriptedEngine
from tests.waiting import WAIT_SECONDS, wait_until

NO_TIMEOUTS = Timeouts()
Scenario = Callable[[AsyncEngine, ScriptedEngine], Coroutine[Any, Any, None]]


def play(scenario: Scenario, timeouts: Timeouts = NO_TIMEOUTS, **engine_options: Any) -> ScriptedEngine:
    """Run `scenario` with a fresh engine, which must be empty afterwards."""
    engine = ScriptedEngine(**engine_options)
    async_engine = AsyncEngine(engine, max_queue=4, timeouts=timeouts)  # type: ignore[arg-type]
    try:
        asyncio.run(asyncio.wait_for(scenario(async_engine, engine), WAIT_SECONDS))
    finally:
        engine.allow()
        async_engine.shutdown()
    assert async_engine.admission.num_in_flight == 0
    assert not async_engine._mailboxes
    assert engine.is_shut_down
    return engine


def _is_finished(report: object) -> bool:
    return isinstance(report, RequestOutput) and report.finished


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


async def collect(engine: AsyncEngine, prompt: str, request_id: str, **params: Any) -> list[RequestOutput]:
    return [output async for output in engine.generate(prompt, SamplingParams(**params), request_id)]


def test_outputs_grow_and_the_last_is_finished() -> None:
    async def scenario(engine: AsyncEngine, scripted: ScriptedEngine) -> None:
        outputs = await collect(engine, "hi", "a", max_tokens=len(scripted.script))
        texts = [output.outputs[0].text for output in outputs]
        assert texts[-1] == SCRIPT
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]

    play(scenario)


def test_many_at_once_each_get_their_own() -> None:
    async def scenario(engine: AsyncEngine, scripted: ScriptedEngine) -> None:
        answers = await asyncio.gather(*(collect(engine, "hi", str(i), max_tokens=i + 1) for i in range(12)))
        for index, outputs in enumerate(answers):
            assert {output.request_id for output in outputs} == {str(index)}
            assert len(outputs[-1].outputs[0].token_ids) == index + 1

    play(scenario)


def test_a_slow_reader_finds_only_the_newest() -> None:
    async def scenario(engine: AsyncEngine, scripted: ScriptedEngine) -> None:
        scripted.hold()
        scripted.allow(1)
        async with aclosing(engine.generate("hi", SamplingParams(max_tokens=50), "a")) as outputs:
            assert len((await anext(outputs)).outputs[0].token_ids) == 1
            scripted.allow()
            await until(lambda: _is_finished(engine._mailboxes["a"].latest.get("a")))
            [last] = [output async for output in outputs]
            assert last.finished
            assert len(last.outputs[0].token_ids) == 50

    play(scenario)


def test_the_next_step_waits_until_a_first_text_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qengine.serving.async_engine._MOST_HELD_SECONDS", WAIT_SECONDS)

    async def scenario(engine: AsyncEngine, scripted: ScriptedEngine) -> None:
        async with aclosing(engine.generate("hi", SamplingParams(max_tokens=5), "a")) as outputs:
            await anext(outputs)
            await asyncio.sleep(0.05)
            assert scripted.num_steps == 1, "it is still on its way"
            assert [output async for output in outputs][-1].finished
        assert scripted.num_steps == 5

    play(scenario)


def test_a_blocked_event_loop_is_woken_once() -> None:
    async def scenario(engine: AsyncEngine, scripted: ScriptedEngine) -> None:
        loop = asyncio.get_running_loop()
        num_calls = 0
        call = loop.call_soon_threadsafe

        def counting(*args: Any, **more: Any) -> Any:
            nonlocal num_calls
            num_calls += 1
            return call(*args, **more)

        scripted.hold()
        async with aclosing(engine.generate("hi", SamplingParams(max_tokens=50), "a")) as outputs:
            first = asyncio.ensure_future(anext(outputs))
            await until(lambda: scripted.has_unfinished)
            loop.call_soon_threadsafe = counting  # type: ignore[method-assign]
            scripted.allow()
            # The loop does not run: 50 steps leave one output and one wake-up.
            wait_until(lambda: _is_finished(engine._outbox.get("a")))
            loop.call_soon_threadsafe = call  # type: ignore[method-assign]
            assert num_calls == 1
            assert (await first).finished

    play(scenario)


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_leaving_aborts_and_frees(how: str) -> None:
    async def scenario(engine: AsyncEngine, scripted: ScriptedEngine) -> None:
        free = scripted.num_free_blocks
        scripted.hold()
        scripted.allow(2)
        if how == "close":
            async with aclosing(engine.generate("hi", SamplingParams(max_tokens=50), "a")) as outputs:
                await anext(outputs)
        else:
            task = asyncio.ensure_future(collect(engine, "hi", "a", max_tokens=50))
            await until(lambda: scripted.has_unfinished)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        scripted.allow()
        await until(lambda: not scripted.has_unfinished)
        assert scripted.aborted == ["a"]
        assert scripted.num_free_blocks == free
        assert (await collect(engine, "hi", "a", max_tokens=3))[-1].finished

    play(scenario)


def test_a_cancel_before_the_engine_saw_the_request_leaves_nothing() -> None:
    async def scenario(engine: AsyncEngine, scripted: ScriptedEngine) -> None:
        for delay in range(20):
            task = asyncio.ensure_future(collect(engine, "hi " * 50, f"r{delay}", max_tokens=100))
            for _ in range(delay):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await until(lambda: not scripted.has_unfinished and not engine._inbox)

    play(scenario)


def test_refusals_reach_their_caller_only() -> None:
    async def scenario(engine: AsyncEngine, scripted: ScriptedEngine) -> None:
        with pytest.raises(RequestError, match="tokens"):
            await collect(engine, "word " * 1000, "long")
        with pytest.raises(RequestError, match="never fit"):
            await collect(engine, NEVER_FITS_PROMPT, "big")
        assert (await collect(engine, NAN_PROMPT, "nan"))[-1].error == "the logits are NaN"
        assert (await collect(engine, "hi", "good"))[-1].finished

    play(scenario)


def test_of_several_requests_all_are_taken_or_none() -> None:
    async def scenario(engine: AsyncEngine, scripted: ScriptedEngine) -> None:
        prompts = ["one", NEVER_FITS_PROMPT, "three"]
        pending = [engine.make_request(prompt, prompt, SamplingParams(max_tokens=100)) for prompt in prompts]
        with pytest.raises(RequestError, match="never fit"):
            await anext(engine.run(pending))
        await until(lambda: not scripted.has_unfinished)
        assert scripted.aborted == ["one"]

    play(scenario)


def test_an_id_in_use_is_refused() -> None:
    async def scenario(engine: AsyncEngine, scripted: ScriptedEngine) -> None:
        scripted.hold()
        first = asyncio.ensure_future(collect(engine, "hi", "same", max_tokens=2))
        await until(lambda: scripted.has_unfinished)
        with pytest.raises(RequestError, match="in use"):
            await collect(engine, "hi", "same")
        scripted.allow()
        assert (await first)[-1].finished

    play(scenario)


def test_death_reaches_everyone_and_stays() -> None:
    async def scenario(engine: AsyncEngine, scripted: ScriptedEngine) -> None:
        scripted.hold(listens=True)
        tasks = [asyncio.ensure_future(collect(engine, "hi", str(i), max_tokens=100)) for i in range(3)]
        tasks.append(asyncio.ensure_future(collect(engine, DIE_PROMPT, "killer")))
        await until(lambda: len(scripted.requests) == 4)
        scripted.allow(1)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [EngineDeadError] * 4
        with pytest.raises(EngineDeadError):
            await collect(engine, "hi", "later")

    play(scenario)


def test_death_is_told_once() -> None:
    engine = ScriptedEngine()
    deaths = []
    async_engine = AsyncEngine(engine, on_death=lambda: deaths.append(threading.current_thread().name))  # type: ignore[arg-type]

    async def scenario() -> None:
        with pytest.raises(EngineDeadError):
            await collect(async_engine, DIE_PROMPT, "killer")

    asyncio.run(asyncio.wait_for(scenario(), WAIT_SECONDS))
    async_engine.shutdown()
    assert deaths == ["qengine-engine"]


@pytest.mark.parametrize("is_idle", [True, False])
def test_devices_that_fail_without_a_step_are_the_end_too(is_idle: bool) -> None:
    """A rank died: told by another thread, while nothing runs or between two steps."""

    async def scenario(engine: AsyncEngine, scripted: ScriptedEngine) -> None:
        scripted.hold()
        tasks = [] if is_idle else [asyncio.ensure_future(collect(engine, "hi", "a", max_tokens=100))]
        await until(lambda: is_idle or scripted.has_unfinished)
        await asyncio.to_thread(scripted.fail, "rank 1 was killed")
        scripted.allow(1)
        for task in tasks:
            with pytest.raises(EngineDeadError):
                await task
        await until(lambda: engine.is_dead)
        with pytest.raises(EngineDeadError):
            await collect(engine, "hi", "later")

    play(scenario)


def test_shutdown_fails_what_is_in_flight() -> None:
    async def scenario(engine: AsyncEngine, scripted: ScriptedEngine) -> None:
        scripted.hold()
        task = asyncio.ensure_future(collect(engine, "hi", "a", max_tokens=100))
        await until(lambda: scripted.has_unfinished)
        stopping = asyncio.ensure_future(asyncio.to_thread(engine.shutdown))
        await until(lambda: engine._should_stop)
        scripted.allow()
        with pytest.raises(ShutDownError, match="shutting down"):
            await task
        await stopping
        with pytest.raises(ShutDownError, match="shutting down"):
            await engine.offload(lambda: None)

    play(scenario)


def test_work_that_waits_for_a_thread_is_told_of_the_end() -> None:
    async def scenario(engine: AsyncEngine, scripted: ScriptedEngine) -> None:
        is_released = threading.Event()
        running = asyncio.ensure_future(engine.offload(is_released.wait, is_long=True))
        waiting = asyncio.ensure_future(engine.offload(lambda: None, is_long=True))
        await asyncio.sleep(0)
        await asyncio.to_thread(engine.shutdown)
        with pytest.raises(ShutDownError, match="shutting down"):
            await waiting
        is_released.set()
        assert await running

    play(scenario)


def test_an_idle_engine_does_not_step() -> None:
    async def scenario(engine: AsyncEngine, scripted: ScriptedEngine) -> None:
        await collect(engine, "hi", "a", max_tokens=3)
        num_steps = scripted.num_steps
        await asyncio.sleep(0.05)
        assert scripted.num_steps == num_steps == 3

    play(scenario)


def test_tokenizing_does_not_hold_the_event_loop() -> None:
    async def scenario(engine: AsyncEngine, scripted: ScriptedEngine) -> None:
        is_released = threading.Event()
        make_request = scripted.make_request

        def slow(*args: Any, **more: Any) -> Any:
            assert is_released.wait(WAIT_SECONDS)
            return make_request(*args, **more)

        scripted.make_request = slow  # type: ignore[method-assign]
        task = asyncio.ensure_future(collect(engine, "hi", "a", max_tokens=3))
        await until(lambda: engine.admission.num_in_flight == 1)
        is_released.set()  # Only a loop that runs comes here.
        assert (await task)[-1].finished

    play(scenario)


def test_generate_counts_and_drains() -> None:
    async def scenario(engine: AsyncEngine, scripted: ScriptedEngine) -> None:
        scripted.hold()
        held = [asyncio.ensure_future(collect(engine, "hi", str(i), n=4, max_tokens=2)) for i in range(3)]
        await until(lambda: engine.admission.num_in_flight == 12)
        with pytest.raises(QueueFullError, match="12 of 12"):
            await collect(engine, "hi", "late")
        engine.admission.begin_drain()
        with pytest.raises(NotAcceptingError):
            await collect(engine, "hi", "later")
        scripted.allow()
        assert all(outputs[-1].finished for outputs in await asyncio.gather(*held))

    play(scenario)


def test_admission_counts_back_whatever_happens() -> None:
    admission = Admission(4)
    with pytest.raises(RequestError, match="at most 4"), admission.reserve(5):
        pass

    def fail_inside() -> None:
        with admission.reserve(3):
            with pytest.raises(QueueFullError), admission.reserve(2):
                pass
            assert admission.num_in_flight == 3
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert admission.num_in_flight == 0


# Timeouts


@pytest.mark.parametrize("is_continued", [False, True])
def test_what_goes_on_with_an_answer_is_not_timed_out_in_the_queue(is_continued: bool) -> None:
    async def scenario(engine: AsyncEngine, scripted: ScriptedEngine) -> None:
        scripted.hold(listens=True)
        first = asyncio.ensure_future(collect(engine, "hi", "a", max_tokens=40))
        await until(lambda: scripted.num_running == 1)
        pending = engine.make_request("b", "hi", SamplingParams(max_tokens=1))
        late = asyncio.ensure_future(last_of(engine.watch([pending], is_continued=is_continued)))
        await asyncio.sleep(0.3)
        scripted.allow()
        if is_continued:
            assert (await late).finished
        else:
            with pytest.raises(QueueTimeoutError):
                await late
        await first

    play(scenario, Timeouts(queue=0.05), max_num_seqs=1)


async def last_of(reports: Any) -> Any:
    return [report async for report in reports][-1]


def test_a_deadline_counts_from_the_calls_arrival() -> None:
    async def scenario(engine: AsyncEngine, scripted: ScriptedEngine) -> None:
        long_ago = time.monotonic() - 1000
        scripted.hold()
        pending = engine.make_request("a", "hi", SamplingParams(max_tokens=40))
        with pytest.raises(RequestTimeoutError, match="500 s"):
            await last_of(engine.watch([pending], arrival_time=long_ago))
        with pytest.raises(RequestTimeoutError, match="500 s"):
            await engine.in_time(asyncio.sleep(WAIT_SECONDS), long_ago)
        assert await engine.in_time(asyncio.sleep(0, "in time"), time.monotonic()) == "in time"

    play(scenario, Timeouts(request=500.0))
