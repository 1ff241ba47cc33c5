"""SpawnExecutor: the ranks of one model as processes of this machine, tensor-parallel times pipeline-parallel.

Every rank gets every step; the first rank of the last stage answers. Invariant: a rank that fails, dies, or says
nothing for longer than `step_timeout` is the end of all of them: they are killed at once, so that none waits for
another, and every call from then on raises EngineDeadError. While they load, what a rank refuses is raised as what it
is. It neither schedules nor computes, and but for what says otherwise only one thread may call it.
"""

from __future__ import annotations

import contextlib
import logging
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

from qengine import environment
from qengine.config import EngineConfig, ParallelConfig
from qengine.errors import ConfigError, EngineDeadError, LoadError, QEngineError
from qengine.parallel.rendezvous import inherited_path, meeting_file
from qengine.parallel.seats import Pair, Seat, Seats, chain
from qengine.parallel.verdicts import Route
from qengine.parallel.watchdog import DEFAULT_LIMIT_S, Watchdog, nccl_advice
from qengine.runtime.channel import ChannelClosedError, ProtocolError, frame
from qengine.runtime.executors import OnFailure
from qengine.runtime.messages import (
    WARM_UP_SECONDS,
    Alive,
    Allocate,
    Check,
    Clear,
    Done,
    Failed,
    Joined,
    Loaded,
    Opened,
    Order,
    Report,
    Result,
    Spent,
    Start,
    Stop,
    decode_report,
    encode,
)
from qengine.runtime.planner import MemoryPlan
from qengine.runtime.rank_processes import RankProcess, RankProcesses
from qengine.runtime.step_messages import StepWriter, read_result
from qengine.scheduling.batch import Batch, StepResult

logger = logging.getLogger(__name__)

RANK_COMMAND = (sys.executable, "-m", "qengine.runtime.rank")
#: What ranks may take to start, to open the model, and to meet.
JOIN_SECONDS = 120.0
#: Silence after which a rank that loads counts as stopped; it speaks every second, or more seldom on a busy computer.
LOADING_SILENCE_SECONDS = 30.0
#: A rank's seat among those of its stage, and its seat between the stages.
_TwoSeats = tuple[Seat | None, Seat | None]
_NO_SEATS: _TwoSeats = (None, None)
#: A rank that fails often does so because its neighbour has died, which is known a little later.
_OBITUARY_SECONDS = 0.3
#: One that says it has lost its neighbour is not the cause: the neighbour has died, or will say what it failed in.
_CAUSE_SECONDS = 2.0
_LISTEN_SECONDS = 0.02
#: What ranks get to say something after this process has not run for a while.
_AWAKENING_SECONDS = 1.0

#: What a silence means, by the report that did not come.
_REASONS: Mapping[type[object], str] = {
    Opened: ": the ranks cannot reach each other, or do not start",
    Joined: "",
    Loaded: ": it hangs or is stopped while it loads",
    Done: ": it hangs or is stopped",
    Result: " (--step-timeout): it hangs, or waits for one that does",
}

_R = TypeVar("_R", bound=Report)


class _RemoteStep:
    """A step that the ranks have been given."""

    def __init__(self, executor: SpawnExecutor, batch: Batch) -> None:
        self._executor = executor
        self._batch = batch

    def finish(self) -> StepResult:
        return self._executor.finish(self._batch)


class SpawnExecutor:
    """Starts the ranks, which load as soon as they can: `join`, `load` and `allocate` must follow.

    Args:
        config: what they are started with; its model must be a path.
        plan: of all cards, as far as headers tell.
        num_threads: CPU threads of each rank.
        command: what a rank is started as; tests have ranks that fail.
        route: how tensors go between cards; `PEER` means gloo where ranks are on a CPU.
        connect_limit_s: seconds that ranks may take to find each other once all of them are up.

    Raises:
        LoadError: they cannot be started.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        plan: MemoryPlan,
        num_threads: int,
        log_level: str,
        show_progress: bool = False,
        command: Sequence[str] = RANK_COMMAND,
        route: Route = Route.PEER,
        connect_limit_s: float = DEFAULT_LIMIT_S,
    ) -> None:
        parallel = config.parallel
        self.max_in_flight = parallel.pipeline_parallel_size
        self._answering = parallel.answering_rank
        self._step_timeout = parallel.step_timeout
        self._connect_limit_s = connect_limit_s
        self._advice = None if route is Route.HOST_STAGED else nccl_advice
        self._is_warm = False
        #: Until when no silence counts.
        self._excused_until = 0.0
        #: When each rank last said anything.
        self._heard = [0.0] * parallel.world_size
        self._unread: list[deque[Report]] = [deque() for _ in range(parallel.world_size)]
        #: By rank: seconds in collectives, of steps for which some rank has not said it yet.
        self._spent: list[deque[float]] = [deque() for _ in range(parallel.world_size)]
        self._writer = StepWriter(2 * config.scheduler.max_num_seqs)
        self._lock = threading.Lock()
        self._failure: str | None = None
        self._listeners: list[OnFailure] = []
        with contextlib.ExitStack() as seated:
            places = _take_seats(parallel, seated) if route is Route.HOST_STAGED else [_NO_SEATS] * parallel.world_size
            meeting = seated.enter_context(meeting_file())
            inherited = [[meeting, *(fd for seat in seats if seat is not None for fd in seat.fds)] for seats in places]
            variables = {**environment.for_rank(num_threads), **route.environment}
            self._processes = RankProcesses(command, parallel.world_size, variables, self._fail, inherited)
            try:
                self._processes.start()
                # The ranks have theirs; ours must be closed for them to notice each other's end.
                seated.close()
                self._introduce(config, plan, log_level, places, inherited_path(meeting), show_progress=show_progress)
            except BaseException as error:
                self.shutdown(grace=0.0)
                if isinstance(error, EngineDeadError):
                    raise LoadError(str(error)) from error
                raise

    def _introduce(
        self,
        config: EngineConfig,
        plan: MemoryPlan,
        log_level: str,
        places: Sequence[_TwoSeats],
        rendezvous: str,
        *,
        show_progress: bool,
    ) -> None:
        """Tell every rank who it is."""
        for rank in self._processes.ranks:
            start = Start(
                config=config,
                plan=plan,
                rank=rank.rank,
                rendezvous=rendezvous,
                log_level=log_level,
                show_progress=show_progress and rank.rank == 0,
                seats=_texts(places[rank.rank]),
            )
            self._send(rank, encode(start))

    # The start

    def join(self, timeout: float = JOIN_SECONDS) -> None:
        """Wait until every rank has met the others.

        Raises:
            ConfigError, LoadError: what a rank refused. EngineDeadError: a rank died, or was not up in time.
            TransportError: they were up and did not find each other; says what to try where cards are connected.
        """
        self._gather(Opened, timeout)
        processes = [rank.process for rank in self._processes.ranks]
        with Watchdog("the first sum over all ranks", self._connect_limit_s, processes, self._advice, self._fail):
            self._gather(Joined, timeout=None)

    def load(self) -> list[Loaded]:
        """Wait until every rank has its weights; by rank.

        Raises:
            ConfigError, LoadError: what a rank refused. EngineDeadError: a rank died, or gives no sign of life.
        """
        loaded = self._gather(Loaded, LOADING_SILENCE_SECONDS, while_alive=True)
        # On CPUs nothing is compiled, so the first step takes no longer than others.
        self._is_warm = all(report.card is None for report in loaded)
        return loaded

    def allocate(self, plan: MemoryPlan) -> None:
        """Have every rank make its KV cache.

        Raises:
            ConfigError, LoadError: what a rank refused. EngineDeadError: a rank died, or gives no sign of life.
        """
        self._order(Allocate(plan))
        self._gather(Done, LOADING_SILENCE_SECONDS, while_alive=True)

    # Steps

    def begin(self, batch: Batch) -> _RemoteStep:
        try:
            self._order(self._writer.write(batch))
        except BaseException as error:
            # The ranks may have got different halves of it.
            self._fail(f"a step was not handed over: {type(error).__name__}: {error}")
            raise
        return _RemoteStep(self, batch)

    def finish(self, batch: Batch) -> StepResult:
        """Wait for the answers of the oldest step in flight.

        Raises:
            EngineDeadError: a rank failed, died, or took longer than `step_timeout`.
        """
        try:
            [report] = self._gather(Result, self._patience, ranks=[self._processes.ranks[self._answering]])
            result = read_result(batch, report)
        except ProtocolError as error:
            self._fail(str(error))
            raise self._dead() from error
        self._is_warm = True
        if result.failed:
            failed = (entry for entry in batch.entries if entry.request_id in result.failed)
            self._order(Clear(tuple(sorted({block for entry in failed for block in entry.block_ids}))))
        return replace(result, collective_seconds=self._take_spent())

    @property
    def _patience(self) -> float:
        """Seconds that a rank may take to react; the first step compiles kernels."""
        return self._step_timeout if self._is_warm else max(self._step_timeout, WARM_UP_SECONDS)

    def _take_spent(self) -> tuple[float, ...]:
        """The slowest rank's seconds in collectives, of each step that all ranks have told of since the last call."""
        num_steps = min(len(spent) for spent in self._spent)
        return tuple([max(spent.popleft() for spent in self._spent) for _ in range(num_steps)])

    def check(self, timeout: float) -> None:
        """With no step in flight: raise EngineDeadError unless every rank answers within `timeout` seconds."""
        self._order(Check())
        self._gather(Done, timeout)

    # Failure and end

    def on_failure(self, callback: OnFailure) -> None:
        """From any thread."""
        with self._lock:
            self._listeners.append(callback)
            failure = self._failure
        if failure is not None:
            callback(failure)

    def shutdown(self, grace: float = 5.0) -> None:
        """Tell the ranks to end, wait for `grace` seconds, kill the others. Idempotent."""
        with self._lock:
            is_first, self._failure = self._failure is None, self._failure or "the ranks have been shut down"
        if is_first:
            for rank in self._processes.ranks:
                with suppress(ChannelClosedError, TimeoutError):
                    rank.channel.send(encode(Stop()), timeout=0.1)
        self._processes.close(grace)

    def _fail(self, reason: str) -> None:
        """The end of all ranks, from any thread; the first reason counts."""
        with self._lock:
            if self._failure is not None:
                return
            self._failure = reason
            listeners = list(self._listeners)
        self._processes.kill()
        logger.error("the ranks were stopped: %s", reason)
        for listener in listeners:
            listener(reason)

    def _dead(self) -> EngineDeadError:
        return EngineDeadError(f"the engine has stopped: {self._failure}")

    # Messages

    def _order(self, order: Order) -> None:
        data = encode(order)
        for rank in self._processes.ranks:
            self._send(rank, data)

    def _send(self, rank: RankProcess, data: bytes) -> None:
        """Listens to all ranks meanwhile: one that is about to answer an earlier step takes no other before that."""
        if self._failure is not None:
            raise self._dead()
        patience = self._patience
        left, deadline = frame(data), time.monotonic() + patience
        while left := self._try_send(rank, left):
            if not self._listen() and not self._wait(deadline, taker=rank):
                option = " (--step-timeout)" if patience == self._step_timeout else ""
                self._fail_silent(f"rank {rank.rank} took nothing for {patience:g} s{option}")
                raise self._dead()

    def _try_send(self, rank: RankProcess, left: memoryview) -> memoryview:
        try:
            return rank.channel.try_send(left)
        except ChannelClosedError as error:
            self._fail_with_obituary(f"rank {rank.rank}: {error}")
            raise self._dead() from error

    def _gather(
        self,
        kind: type[_R],
        timeout: float | None,
        ranks: Sequence[RankProcess] | None = None,
        *,
        while_alive: bool = False,
    ) -> list[_R]:
        """One report of a kind from each of `ranks` (all of them), while all are listened to.

        Args:
            timeout: seconds for it; None for no limit of this kind.
            while_alive: a rank that gives signs of life has as long again after each.

        Raises:
            ConfigError, LoadError: a rank says so. EngineDeadError: a rank failed, died or says nothing for `timeout`.
        """
        began = time.monotonic()
        reports: dict[int, _R] = {}
        waiting = {rank.rank for rank in (ranks if ranks is not None else self._processes.ranks)}
        while waiting:
            for rank in [rank for rank in waiting if self._unread[rank]]:
                reports[rank] = self._expect(kind, rank, self._unread[rank].popleft())
                waiting.remove(rank)
            since = {rank: max(began, self._heard[rank]) if while_alive else began for rank in waiting}
            earliest = min(since.values(), default=began)
            if waiting and not self._poll(None if timeout is None else earliest + timeout):
                silent = ", ".join(str(rank) for rank in sorted(waiting) if since[rank] == earliest)
                self._fail_silent(f"rank {silent} did not answer within {timeout:g} s{_REASONS[kind]}")
                raise self._dead()
        return [reports[rank] for rank in sorted(reports)]

    def _expect(self, kind: type[_R], rank: int, report: Report) -> _R:
        if not isinstance(report, kind):
            self._fail(f"rank {rank} said {type(report).__name__} when {kind.__name__} was expected")
            raise self._dead()
        return report

    def _poll(self, deadline: float | None) -> bool:
        """Read what ranks say, at least one message, whoever is waited for: one may be ahead of the others.

        Returns:
            False when time is over.
        """
        while True:
            if self._listen():
                return True
            if not self._wait(deadline):
                return False

    def _listen(self) -> bool:
        """Read what ranks have said, to be looked at when it is asked for. Returns whether there was anything."""
        if self._failure is not None:
            raise self._dead()
        found = False
        for rank in self._processes.ranks:
            report = self._try_receive(rank)
            if report is not None:
                found = True
                self._heard[rank.rank] = time.monotonic()
                if isinstance(report, Spent):
                    self._spent[rank.rank].append(report.seconds)
                elif not isinstance(report, Alive):
                    self._unread[rank.rank].append(report)
        return found

    def _wait(self, deadline: float | None, taker: RankProcess | None = None) -> bool:
        """Until there is something to read, `taker` takes something, or time is over, which is False."""
        poll = select.poll()
        for rank in self._processes.ranks:
            poll.register(rank.channel, select.POLLIN | (select.POLLOUT if rank is taker else 0))
        if deadline is None:
            return bool(poll.poll())
        entered = time.monotonic()
        left = max(0.0, deadline - entered, self._excused_until - entered)
        if poll.poll(left * 1000):
            return True
        now = time.monotonic()
        if now <= entered + left + _LISTEN_SECONDS:
            return False
        # A computer that stood still has kept the ranks from speaking, too.
        self._excused_until = now + _AWAKENING_SECONDS
        return bool(poll.poll(_AWAKENING_SECONDS * 1000))

    def _try_receive(self, rank: RankProcess) -> Report | None:
        try:
            data = rank.channel.try_receive()
            report = None if data is None else decode_report(data)
        except ChannelClosedError as error:
            self._fail_with_obituary(f"rank {rank.rank}: {error}")
            raise self._dead() from error
        except ProtocolError as error:
            self._fail(f"rank {rank.rank}: {error}")
            raise self._dead() from error
        if isinstance(report, Failed):
            raise self._failed(rank.rank, report)
        return report

    def _failed(self, rank: int, report: Failed) -> QEngineError:
        if report.kind in ("config", "load"):
            self._fail(report.text)
            return ConfigError(report.text) if report.kind == "config" else LoadError(report.text)
        self._fail_with_obituary(f"rank {rank}: {report.text}", is_cause=report.kind == "internal")
        return self._dead()

    def _fail_silent(self, reason: str) -> None:
        """Fail because of a silence, but name those first that are stopped: the others wait for them."""
        self._fail("; ".join([*self._processes.stopped(), reason]))

    def _fail_with_obituary(self, reason: str, *, is_cause: bool = False) -> None:
        """Fail, but name those first that have died: whoever is left often only says that it misses them.

        Unless `is_cause`, what another rank has failed in counts instead, which it may be about to say.
        """
        died, causes = self._processes.obituaries(_OBITUARY_SECONDS if is_cause else 0.0), list[str]()
        deadline = time.monotonic() + _CAUSE_SECONDS
        while not (is_cause or died or causes) and time.monotonic() < deadline:
            causes = self._causes()
            died = self._processes.obituaries(_LISTEN_SECONDS)
        self._fail("; ".join([*died, *(causes or [reason])]))

    def _causes(self) -> list[str]:
        """What ranks have said, and nobody has heard yet, of failures that are their own."""
        reports = ((rank.rank, report) for rank in self._processes.ranks for report in _untold_failures(rank))
        return [f"rank {rank}: {report.text}" for rank, report in reports if report.kind != "transport"]


def _untold_failures(rank: RankProcess) -> Iterator[Failed]:
    """What a rank has told of a failure since it was last listened to."""
    with suppress(ChannelClosedError, ProtocolError):
        while (data := rank.channel.try_receive()) is not None:
            report = decode_report(data)
            if isinstance(report, Failed):
                yield report


def _take_seats(parallel: ParallelConfig, stack: contextlib.ExitStack) -> list[_TwoSeats]:
    """By rank: its seat among the ranks of its stage, and its seat between the stages; closed with the stack."""
    tp, pp = parallel.tensor_parallel_size, parallel.pipeline_parallel_size

    def take(ranks: range, pairs: Sequence[Pair] = ()) -> list[Seat | None]:
        size = len(ranks)
        return list(stack.enter_context(Seats(size, pairs, names=ranks))) if size > 1 else [None]

    stages = [take(parallel.stage_ranks(stage)) for stage in range(pp)]
    pipes = [take(parallel.pipe_ranks(place), chain(pp)) for place in range(tp)]
    return [(stages[stage][place], pipes[place][stage]) for stage in range(pp) for place in range(tp)]


def _texts(seats: _TwoSeats) -> tuple[str | None, str | None]:
    in_stage, between = (None if seat is None else seat.to_text() for seat in seats)
    return in_stage, between
