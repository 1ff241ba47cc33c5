"""What passes between an engine and its ranks, with ranks that compute nothing."""

from __future__ import annotations

import contextlib
import select
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from qengine.config import EngineConfig, ParallelConfig
from qengine.runtime import spawn_executor
from qengine.runtime.planner import MemoryPlan
from qengine.runtime.spawn_executor import SpawnExecutor, _take_seats
from qengine.scheduling.batch import Batch, BatchEntry
from tests.runtime.chatty_rank import ANSWER_BYTES

PLAN = MemoryPlan(
    max_model_len=64,
    wanted_len=64,
    fits=True,
    max_num_batched_tokens=64,
    max_num_seqs=4,
    block_size=16,
    num_blocks=4,
    cards=(),
)


@pytest.fixture
def chatty() -> Iterator[SpawnExecutor]:
    options = {"model": "none", "device": "cpu", "pipeline_parallel_size": 2, "step_timeout": 10.0}
    executor = SpawnExecutor(
        EngineConfig.from_options(options),
        plan=PLAN,
        num_threads=1,
        log_level="warning",
        command=(sys.executable, "-m", "tests.runtime.chatty_rank"),
    )
    try:
        executor.join()
        executor.load()
        yield executor
    finally:
        executor.shutdown(grace=0.0)


def test_a_long_order_reaches_a_rank_that_is_busy_with_a_long_answer(chatty: SpawnExecutor) -> None:
    """Two steps are in flight; the rank reads the second only when its answer to the first has been taken.

    What both ranks spent in collectives in the first is known by then; that of the slower one counts.
    """
    tokens = tuple(range(2**20, 2**20 + 2**18))
    steps = [
        chatty.begin(Batch((BatchEntry(name, tokens, 0, tuple(range(2**18)), None, pool="last"),)))
        for name in ("a", "b")
    ]
    results = [step.finish() for step in steps]
    for name, result in zip(("a", "b"), results, strict=True):
        assert len(result.pooled[name]) == ANSWER_BYTES
    assert results[0].collective_seconds[:1] == (2.0,)
    assert {seconds for result in results for seconds in result.collective_seconds} == {2.0}


def test_seats_are_named_by_the_ranks_of_the_model() -> None:
    with contextlib.ExitStack() as stack:
        seats = _take_seats(ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=3), stack)
        names = [tuple(seat.names if seat else () for seat in both) for both in seats]
        places = [tuple(seat.names[seat.rank] if seat else -1 for seat in both) for both in seats]
    assert names == [((first, first + 1), (place, place + 2, place + 4)) for first in (0, 2, 4) for place in (0, 1)]
    assert places == [(rank, rank) for rank in range(6)]


def test_a_silence_that_this_process_slept_through_is_excused_once(
    chatty: SpawnExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A computer that stood still has kept the ranks from speaking, too. One that only was late is another matter."""
    monkeypatch.setattr(spawn_executor, "_AWAKENING_SECONDS", 0.05)
    waits, poll = [], select.poll

    class Late:
        """It takes longer than it was told to, the first time."""

        def __init__(self) -> None:
            self._poll = poll()

        def register(self, *about: Any) -> None:
            self._poll.register(*about)

        def poll(self, timeout: float | None = None) -> list[tuple[int, int]]:
            waits.append(timeout)
            found = self._poll.poll(timeout)
            if len(waits) == 1:
                time.sleep(0.2)
            return found

    monkeypatch.setattr(select, "poll", Late)
    assert not chatty._wait(time.monotonic() + 0.01)
    assert len(waits) == 2, "once more, for the ranks to speak"
    assert not chatty._wait(time.monotonic() - 1.0)
    assert len(waits) == 3
