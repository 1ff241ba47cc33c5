"""A rank that fails as it is told: `python -m tests.runtime.failing_rank RANK HOW ...`, then what any rank is given.

HOW is "raise" (in its fifth step), "raise together" (in its fifth step of two sequences), "run out" (of memory),
"break a sum" (it fails within one, and says so after the others),
"vanish" (the process ends there), "hang" (it answers no more from there on), "garbage" (it says nonsense), "stop"
(the process is stopped before it opens the model), "stop loading" or "stop allocating" (it is stopped there), or "load
slowly". The other ranks are sound.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from qengine.parallel.host_staged import HostStagedTransport
from qengine.process_end import exit_now
from qengine.runtime import rank_service as rank
from qengine.runtime.channel import Channel
from qengine.runtime.messages import Start
from qengine.runtime.out_of_memory import memory_guard
from qengine.runtime.rank import open_channel
from qengine.runtime.worker import Worker

FIRST_BAD_STEP = 5


def _raise(channel: Channel) -> None:
    raise RuntimeError(f"evil forward, {gc.get_freeze_count()} objects out of the collector's sight")


def _run_out(channel: Channel) -> None:
    with memory_guard(torch.device("cpu")):
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")


def _break_a_sum(channel: Channel) -> None:
    def exchange(*_: Any) -> Any:
        raise RuntimeError("evil sum")

    real = rank._report_failure

    def report_late(channel: Channel, error: Exception) -> None:
        # The others are told from within the transport, before the engine is.
        time.sleep(0.2)
        real(channel, error)

    rank._report_failure = report_late
    HostStagedTransport._exchange = exchange  # type: ignore[method-assign]


def _vanish(channel: Channel) -> None:
    os._exit(7)


def _hang(channel: Channel) -> None:
    threading.Event().wait()


def _talk_nonsense(channel: Channel) -> None:
    channel.send(b"\xc1 nonsense")
    threading.Event().wait()


def _stop(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


#: By what they stop in.
STOPS = {"stop loading": "load", "stop allocating": "allocate"}

FAULTS: Mapping[str, Callable[[Channel], None]] = {
    "raise": _raise,
    "raise together": _raise,
    "run out": _run_out,
    "break a sum": _break_a_sum,
    "vanish": _vanish,
    "hang": _hang,
    "garbage": _talk_nonsense,
}


def break_steps(how: str, channel: Channel) -> None:
    """Have this process's worker fail."""
    real, calls = Worker.begin, []

    def begin(self: Worker, batch: Any) -> Any:
        if how != "raise together" or len(batch.entries) == 2:
            calls.append(batch)
        if len(calls) >= FIRST_BAD_STEP:
            FAULTS[how](channel)
        return real(self, batch)

    Worker.begin = begin  # type: ignore[method-assign]


def slow_down() -> None:
    """Have this process's worker load for five seconds more, and say more often that it does."""
    rank.ALIVE_SECONDS = 0.2
    real = Worker.load

    def load(self: Worker, **options: Any) -> Any:
        time.sleep(5.0)
        return real(self, **options)

    Worker.load = load  # type: ignore[method-assign]


def main(bad_rank: int, how: str, rest: list[str]) -> int:
    real = rank._expect_start

    def expect_start(channel: Channel) -> Start:
        start = real(channel)
        if start.rank == bad_rank and how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif start.rank == bad_rank and how in STOPS:
            setattr(Worker, STOPS[how], _stop)
        elif start.rank == bad_rank and how == "load slowly":
            slow_down()
        elif start.rank == bad_rank:
            break_steps(how, channel)
        return start

    rank._expect_start = expect_start
    return rank.main(open_channel(*map(int, rest)))


if __name__ == "__main__":
    exit_now(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
