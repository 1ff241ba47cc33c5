"""AsyncEngine: one thread steps an Engine for any number of coroutines.

    async for output in engine.generate("Hello", params, "id"): ...   # leaving the loop early aborts the request

Invariants: only the engine thread touches the Engine after construction (`make_request` excepted, which is thread-safe
and runs in a small pool); every request that was submitted ends in a finished output, an exception, or its caller left;
what a slow reader has not taken is replaced by the newer cumulative output, so nothing grows without bound.
An exception out of a step, or devices that fail without one, are the end: every request in flight and every later one
gets EngineDeadError.
It knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from qengine.engine import Engine, EngineInfo, PendingRequest
from qengine.errors import EngineDeadError, QEngineError, RequestError
from qengine.grammars.compiler import CompiledGrammar
from qengine.grammars.sources import GrammarSource
from qengine.grammars.trial import NUM_PROCESSES, TooSlowError
from qengine.request import Pooling, RequestOutput, RequestProgress, SamplingParams
from qengine.serving.admission import Admission, Allowance, QueueTimeoutError, RequestTimeoutError, ShutDownError
from qengine.serving.limits import LIMITS
from qengine.serving.mailbox import Mailbox, Report
from qengine.serving.metrics.recorder import Recorder
from qengine.serving.tracing import Tracer
from qengine.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

NUM_TOKENIZER_THREADS = 2
#: What a first text may take to leave before the next step begins all the same.
_MOST_HELD_SECONDS = 0.001
_STOPPING = "the server is shutting down"
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Add:
    pending: tuple[PendingRequest, ...]
    is_watched: bool


@dataclass(frozen=True, slots=True)
class _Abort:
    request_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Expire:
    """Drop these, which belong together, unless one of them has left the queue."""

    request_ids: tuple[str, ...]


_Command = _Add | _Abort | _Expire


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds that a request may wait in the queue, and may take from its arrival to its end; None for any time."""

    queue: float | None = None
    request: float | None = None


class AsyncEngine:
    """Owns `engine` and the thread that drives it.

    Args:
        engine: a started engine; nobody else may use it from now on.
        max_queue: sequences that may wait beyond the engine's `max_num_seqs`.
        on_death: called once, in the engine thread, when a step raised.
        recorder: turns what the engine does into metrics.
        timeouts: of every request.
        tracer: told of every call, if there is one.
        model_name: what clients call the model; by default the engine's own name.

    Attributes:
        admission: counts what is in flight; whoever calls `run` holds a reservation.
        text_calls: counts calls that have text turned into tokens and nothing more.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_queue: int = 128,
        on_death: Callable[[], None] | None = None,
        recorder: Recorder | None = None,
        timeouts: Timeouts = Timeouts(),
        tracer: Tracer | None = None,
        model_name: str = "",
    ) -> None:
        self.tracer = tracer
        self.model_name = model_name or engine.info.model
        self._engine = engine
        engine.observer = recorder
        engine.on_scheduled = self._tell_progress
        self._recorder = recorder
        self._on_death = on_death
        self._timeouts = timeouts
        self._step_began: float | None = None
        self.admission = Admission(engine.info.max_num_seqs + max_queue)
        self.text_calls = Allowance(LIMITS.num_text_calls, "calls that count tokens")
        self._pool = ThreadPoolExecutor(NUM_TOKENIZER_THREADS, thread_name_prefix="qengine-tokenizer")
        # What takes long because its client wants much; it holds up its own kind alone.
        self._long_pool = ThreadPoolExecutor(1, thread_name_prefix="qengine-long")
        # Apart from the tokenizer's threads, so that a grammar that takes its time holds up other grammars alone.
        self._grammar_pool = ThreadPoolExecutor(NUM_PROCESSES, thread_name_prefix="qengine-grammar")
        # Guarded by _wakeup: the inbox, the stop flag, and the outbox on its way to the event loop.
        self._wakeup = threading.Condition()
        self._inbox: list[_Command] = []
        self._outbox: dict[str, Report | QEngineError] = {}
        self._failure: str | None = None  # Why the devices failed, in whatever thread that was noticed.
        self._death: str | None = None  # Why the engine stopped; each caller gets an exception of its own.
        self._should_stop = False
        self._delivery_is_due = False
        self._is_held = False  # The engine thread waits until a first text has left.
        # Touched in the event loop only.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._mailboxes: dict[str, Mailbox] = {}
        # Touched in the engine thread only: what was last told of requests that are watched and have no token yet.
        self._watched: dict[str, RequestProgress | None] = {}
        self._thread = threading.Thread(target=self._run, name="qengine-engine", daemon=True)
        self._thread.start()
        engine.on_failure(self._note_failure)

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    @property
    def tokenizer(self) -> Tokenizer:
        return self._engine.tokenizer

    @property
    def is_dead(self) -> bool:
        return self._death is not None

    @property
    def is_stuck(self) -> bool:
        """Whether the step that runs now should have ended long ago."""
        began = self._step_began
        return began is not None and time.monotonic() - began > LIMITS.stuck_step_seconds

    # For callers in the event loop

    async def offload(self, work: Callable[[], _T], *, is_long: bool = False) -> _T:
        """Run `work` (tokenization, templates) in a thread, so that the event loop goes on.

        `is_long` is for what may take seconds: then it waits for others of its kind, and nobody else for it.
        """
        return await self._in_thread(self._long_pool if is_long else self._pool, work)

    async def offload_text(self, work: Callable[[], _T], *, is_long: bool = False) -> _T:
        """The same for calls that want nothing more than that. Raises QueueFullError if there are too many of them."""
        with self.text_calls.reserve() as share:
            share.grow(1)
            return await self.offload(work, is_long=is_long)

    def make_embedding_request(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        *,
        pooling: Pooling,
        normalize: bool,
        cache_salt: str,
        add_special_tokens: bool,
        arrival_time: float,
    ) -> PendingRequest:
        """`Engine.make_embedding_request`, like `make_request`."""
        return self._engine.make_embedding_request(
            request_id,
            prompt,
            pooling=pooling,
            normalize=normalize,
            cache_salt=cache_salt,
            add_special_tokens=add_special_tokens,
            arrival_time=arrival_time,
        )

    async def compile_grammar(self, source: GrammarSource) -> CompiledGrammar:
        """`Engine.compile_grammar`, while the event loop goes on.

        Raises:
            RequestError: it is no grammar, or costs too much. QueueTimeoutError: too many others are before it, or the
                computer is too busy. ShutDownError: the server stops.
        """
        seconds = LIMITS.grammar_wait_seconds
        compiling = self._in_thread(self._grammar_pool, lambda: self._engine.compile_grammar(source))
        try:
            return await asyncio.wait_for(compiling, seconds)
        except TooSlowError as error:
            raise QueueTimeoutError(str(error)) from error
        except asyncio.TimeoutError as error:
            raise QueueTimeoutError(
                f"the grammar was not compiled within {seconds:g} s, as others are before it; try again later"
            ) from error

    async def in_time(self, work: Coroutine[Any, Any, _T], arrival_time: float) -> _T:
        """The result of `work`, which a call that came at `arrival_time` needs before the engine can begin.

        Raises:
            RequestTimeoutError: --request-timeout was over first. Anything that `work` raises.
        """
        seconds = self._seconds_left(arrival_time)
        try:
            return await asyncio.wait_for(work, seconds)
        except asyncio.TimeoutError as error:
            raise self._took_too_long() from error

    def _seconds_left(self, arrival_time: float) -> float | None:
        allowed = self._timeouts.request
        return None if allowed is None else max(0.0, arrival_time + allowed - time.monotonic())

    def _took_too_long(self) -> RequestTimeoutError:
        return RequestTimeoutError(f"the request took longer than {self._timeouts.request:g} s and was stopped")

    async def _in_thread(self, pool: ThreadPoolExecutor, work: Callable[[], _T]) -> _T:
        """Raises ShutDownError for work that the end came before or in between, beside what `work` raises."""
        try:
            future = pool.submit(work)
        except RuntimeError as error:  # The pool is closed.
            raise ShutDownError(_STOPPING) from error
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError as error:
            if self._should_stop and future.cancelled():
                raise ShutDownError(_STOPPING) from error
            raise
        except EngineDeadError as error:
            if self._should_stop:
                raise ShutDownError(_STOPPING) from error
            raise

    def make_request(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        cache_salt: str = "",
        add_special_tokens: bool = True,
        arrival_time: float | None = None,
        grammar: CompiledGrammar | None = None,
    ) -> PendingRequest:
        """`Engine.make_request`: tokenize and check. Thread-safe, may be slow: call it through `offload`."""
        return self._engine.make_request(
            request_id,
            prompt,
            params,
            cache_salt=cache_salt,
            add_special_tokens=add_special_tokens,
            arrival_time=arrival_time,
            grammar=grammar,
        )

    async def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        request_id: str,
        *,
        cache_salt: str = "",
        add_special_tokens: bool = True,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answer one prompt; each output has all the text so far, the last one is finished.

        Closing or cancelling the iterator aborts the request and frees its blocks.

        Raises:
            RequestError, QueueFullError, NotAcceptingError: it was refused. EngineDeadError: the engine stopped.
        """

        def prepare() -> PendingRequest:
            return self.make_request(
                request_id, prompt, params, cache_salt=cache_salt, add_special_tokens=add_special_tokens
            )

        with self.admission.reserve(params.n):
            pending = await self.offload(prepare)
            async with aclosing(self.run([pending])) as outputs:
                async for output in outputs:
                    yield output

    async def run(
        self, pending: Sequence[PendingRequest], *, arrival_time: float | None = None
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answer several prepared requests together; outputs of all come as they progress.

        All are taken or none: if the engine refuses one, the others are dropped. The caller holds a reservation.

        Args:
            arrival_time: when the call came, by the monotonic clock; --request-timeout counts from it. By default now.

        Raises:
            RequestError: refused. EngineDeadError: the engine stopped.
            QueueTimeoutError, RequestTimeoutError: it took too long.
        """
        async with aclosing(self.watch(pending, wants_progress=False, arrival_time=arrival_time)) as reports:
            async for report in reports:
                assert isinstance(report, RequestOutput)
                yield report

    async def watch(
        self,
        pending: Sequence[PendingRequest],
        *,
        wants_progress: bool = True,
        arrival_time: float | None = None,
        is_continued: bool = False,
    ) -> AsyncGenerator[Report, None]:
        """The same with the progress of each request before its outputs, whenever it has changed. Raises as `run`.

        `is_continued` is for requests that go on with an answer that was begun: --queue-timeout is not for them.
        """
        self._check_alive()
        loop = self._bind_loop()
        mailbox = Mailbox()
        unfinished = {request.request_id for request in pending}
        if len(unfinished) != len(pending) or not unfinished.isdisjoint(self._mailboxes):
            raise RequestError("a request id is already in use; give each request its own", param="request_id")
        self._mailboxes.update(dict.fromkeys(unfinished, mailbox))
        self._send(_Add(tuple(pending), wants_progress))
        if self.is_dead:
            # It died between the check and the registration; nobody else will tell this mailbox.
            loop.call_soon(self._deliver)
        timers = self._set_deadline(loop, mailbox, time.monotonic() if arrival_time is None else arrival_time)
        if not is_continued:
            timers += self._set_queue_timer(loop, tuple(unfinished))
        try:
            while unfinished:
                for report in await mailbox.take():
                    if isinstance(report, RequestOutput) and report.finished:
                        self._forget(unfinished, report.request_id)
                    yield report
                self._go_on()
        finally:
            for timer in timers:
                timer.cancel()
            if unfinished:
                self._send(_Abort(tuple(unfinished)))
            for request_id in list(unfinished):
                self._forget(unfinished, request_id)

    def _set_deadline(
        self, loop: asyncio.AbstractEventLoop, mailbox: Mailbox, arrival_time: float
    ) -> list[asyncio.TimerHandle]:
        seconds = self._seconds_left(arrival_time)
        return [] if seconds is None else [loop.call_later(seconds, mailbox.expire, self._took_too_long())]

    def _set_queue_timer(
        self, loop: asyncio.AbstractEventLoop, request_ids: tuple[str, ...]
    ) -> list[asyncio.TimerHandle]:
        seconds = self._timeouts.queue
        return [] if seconds is None else [loop.call_later(seconds, self._send, _Expire(request_ids))]

    def _check_alive(self) -> None:
        if self._death is not None:
            raise _death_error(self._death)

    def _forget(self, unfinished: set[str], request_id: str) -> None:
        unfinished.discard(request_id)
        self._mailboxes.pop(request_id, None)

    def _bind_loop(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        assert self._loop is loop, "one AsyncEngine serves one event loop"
        return loop

    def _send(self, command: _Command) -> None:
        with self._wakeup:
            self._inbox.append(command)
            self._wakeup.notify()

    # In the event loop, on behalf of the engine thread

    def _deliver(self) -> None:
        """Hand what the engine thread left in the outbox to the mailboxes."""
        with self._wakeup:
            outbox, self._outbox = self._outbox, {}
            self._delivery_is_due = False
            death = self._death
        for request_id, item in outbox.items():
            mailbox = self._mailboxes.get(request_id)
            if mailbox is None:
                continue
            if isinstance(item, Report):
                mailbox.latest[request_id] = item
                mailbox.filled.set()
            else:
                mailbox.fail(item)
        if death is not None:
            for mailbox in self._mailboxes.values():
                mailbox.fail(_death_error(death))

    # In the engine thread

    def _run(self) -> None:
        try:
            while self._take_commands():
                outputs = self._step() if self._engine.has_unfinished else []
                if self._recorder is not None:
                    self._recorder.tell_load(self._engine.load(), self._engine.totals)
                if outputs:
                    self._is_held = any(_is_beginning(output) for output in outputs)
                    self._post({output.request_id: output for output in outputs})
                    self._unwatch([output.request_id for output in outputs])
                    self._let_first_texts_leave()
        except BaseException as error:  # Whatever it was, every waiting client must hear of it.
            logger.critical("the engine stopped after an internal failure", exc_info=error)
            if self._recorder is not None:
                self._recorder.tell_death("step")
            self._die("the engine has stopped after an internal failure; restart the server")
            if self._on_death is not None:
                self._on_death()
        else:
            self._die(_STOPPING)

    def _let_first_texts_leave(self) -> None:
        """Where a step began an answer, let the event loop send it first: on a core that both share it would wait for
        the kernel to take the core from the next step, which takes milliseconds."""
        with self._wakeup:
            self._wakeup.wait_for(lambda: not self._is_held or self._should_stop, _MOST_HELD_SECONDS)
            self._is_held = False

    def _go_on(self) -> None:
        """In the event loop: somebody has sent what there was and asks for more."""
        if self._is_held:
            with self._wakeup:
                self._is_held = False
                self._wakeup.notify()

    def _step(self) -> list[RequestOutput]:
        self._step_began = time.monotonic()
        try:
            return self._engine.step()
        finally:
            self._step_began = None

    def _take_commands(self) -> bool:
        """Apply what callers sent, waiting for it if there is nothing else to do. False when it is time to stop."""
        with self._wakeup:
            while not (self._inbox or self._should_stop or self._failure or self._engine.has_unfinished):
                self._wakeup.wait()
            if self._should_stop:
                return False
            if self._failure is not None:
                raise EngineDeadError(self._failure)
            commands, self._inbox = self._inbox, []
        for command in commands:
            if isinstance(command, _Add):
                self._add(command)
            elif isinstance(command, _Abort):
                self._drop(command.request_ids)
            else:
                self._expire(command.request_ids)
        return True

    def _note_failure(self, reason: str) -> None:
        """In any thread: have the engine's thread stop, which may be waiting for something to do."""
        with self._wakeup:
            self._failure = reason
            self._wakeup.notify()

    def _add(self, command: _Add) -> None:
        for request in command.pending:
            try:
                self._engine.add(request)
            except RequestError as error:
                self._drop([other.request_id for other in command.pending if other is not request])
                self._post({request.request_id: error})
                return
        if command.is_watched:
            self._watched.update(dict.fromkeys([request.request_id for request in command.pending]))

    def _tell_progress(self) -> None:
        """Before a step is computed, which may take long. Nothing to do where nobody watches."""
        if not self._watched:
            return
        changed = [found for found in self._engine.progress(self._watched) if found != self._watched[found.request_id]]
        self._watched.update({found.request_id: found for found in changed})
        if changed:
            self._post({found.request_id: found for found in changed})

    def _unwatch(self, request_ids: Sequence[str]) -> None:
        if self._watched:
            for request_id in request_ids:
                self._watched.pop(request_id, None)

    def _expire(self, request_ids: Sequence[str]) -> None:
        if any(self._engine.has_started(request_id) for request_id in request_ids):
            return
        self._drop(request_ids)
        seconds = self._timeouts.queue
        error = QueueTimeoutError(f"the request waited for {seconds:g} s and was not begun; try again later")
        self._post({request_ids[0]: error})

    def _drop(self, request_ids: Sequence[str]) -> None:
        self._unwatch(request_ids)
        for request_id in request_ids:
            self._engine.abort(request_id)

    def _post(self, items: Mapping[str, Report | QEngineError]) -> None:
        with self._wakeup:
            self._outbox.update(items)
            self._schedule_delivery()

    def _die(self, reason: str) -> None:
        with self._wakeup:
            self._death = reason
            self._schedule_delivery()

    def _schedule_delivery(self) -> None:
        """Ask the event loop to collect the outbox, once for however many steps until it does."""
        if self._delivery_is_due or self._loop is None:
            return
        self._delivery_is_due = True
        with suppress(RuntimeError):  # The loop is closed: nobody waits any more.
            self._loop.call_soon_threadsafe(self._deliver)

    # For the owner

    def shutdown(self, timeout: float | None = None) -> None:
        """Stop after the current step, fail what is in flight, release the engine. Idempotent; blocks, so no coroutine.

        Args:
            timeout: seconds to wait for the current step; then the thread and its engine are left to themselves.
        """
        with self._wakeup:
            self._should_stop = True
            self._wakeup.notify()
        self._thread.join(timeout)
        for pool in (self._pool, self._long_pool, self._grammar_pool):
            pool.shutdown(wait=False, cancel_futures=True)
        if self._thread.is_alive():
            self._die(_STOPPING)
        else:
            self._engine.shutdown()


def _death_error(reason: str) -> EngineDeadError:
    return ShutDownError(reason) if reason == _STOPPING else EngineDeadError(reason)


def _is_beginning(output: RequestOutput) -> bool:
    return any(len(choice.token_ids) == 1 for choice in output.outputs)
