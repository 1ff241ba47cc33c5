"""Engine: requests in, text out, one step at a time.

    pending = engine.make_request("id", "Hello", SamplingParams())   # any thread
    engine.add(pending)                                              # the engine's thread, like everything below
    while engine.has_unfinished:
        for output in engine.step(): ...

Invariant: every request that was added ends in exactly one finished output, or was aborted by its owner. One engine is
driven by one thread; only `make_request` may be called from others. It knows nothing of HTTP and of how models load.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qengine.answers import Choice, PendingRequest, output_of, public_logprobs
from qengine.config import EngineConfig
from qengine.errors import EngineDeadError, GrammarError, RequestError, StepMemoryError
from qengine.grammars.sources import GrammarSource, source_of
from qengine.imports import import_late, no_garbage
from qengine.request import (
    GRAMMAR_FAILED,
    Pooling,
    PositionLogprobs,
    Request,
    RequestOutput,
    RequestProgress,
    SamplingParams,
)
from qengine.runtime.executors import OnFailure, StepInFlight
from qengine.scheduling.batch import Batch, StepResult
from qengine.scheduling.records import SchedulerStats
from qengine.startup import EngineInfo, EngineParts, start_parts
from qengine.step_stats import EngineLoad, StepObserver, StepStats
from qengine.tokenizer import IncrementalDetokenizer

if TYPE_CHECKING:
    from qengine.grammars.compiler import CompiledGrammar, GrammarCompiler
    from qengine.grammars.state import GrammarState
    from qengine.grammars.vocabulary import Vocabulary

__all__ = ["Engine", "EngineInfo", "PendingRequest"]

logger = logging.getLogger(__name__)


class _StepWithoutMemory:
    """In place of a step that could not be begun; it ends like one that failed later."""

    def __init__(self, error: StepMemoryError) -> None:
        self._error = error

    def finish(self) -> StepResult:
        raise self._error


class Engine:
    """A loaded model with its scheduler, KV cache and tokenizer. Make one with `Engine.start`.

    Attributes:
        observer: hears of every step, end and abort; the engine's owner may set one.
        on_scheduled: called within `step`, when it is chosen what is computed next and before it is; the same.
    """

    def __init__(self, parts: EngineParts) -> None:
        self.info = parts.info
        self.tokenizer = parts.tokenizer
        self.scheduler = parts.scheduler
        self.observer: StepObserver | None = None
        self.on_scheduled: Callable[[], None] | None = None
        self._executor = parts.executor
        self._eos_token_ids = parts.eos_token_ids
        self._grammars: GrammarCompiler | None = None
        self._grammars_lock = threading.Lock()
        self._seed = parts.seed
        self._unseeded = itertools.count()
        self._groups: dict[str, PendingRequest] = {}
        self._owners: dict[str, tuple[PendingRequest, Choice]] = {}
        self._in_flight: deque[tuple[Batch, StepInFlight]] = deque()
        self._death: str | None = None

    @classmethod
    def start(cls, config: EngineConfig, *, show_progress: bool = False, import_seconds: float = 0.0) -> Engine:
        """Load a model and make it ready.

        Args:
            import_seconds: what the process took before, for the table of the start.

        Raises:
            ConfigError: an option is wrong for this model or machine (found before weights are read).
            LoadError: the model cannot be found or loaded.
        """
        with no_garbage():
            return cls(start_parts(config, show_progress=show_progress, import_seconds=import_seconds))

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has something to do: requests, or steps whose requests were aborted meanwhile."""
        return bool(self._groups or self._in_flight)

    def on_failure(self, callback: OnFailure) -> None:
        """Have `callback` told, from any thread, when the devices fail while no step runs."""
        self._executor.on_failure(callback)

    @property
    def num_running(self) -> int:
        return self.scheduler.num_running

    @property
    def num_waiting(self) -> int:
        return self.scheduler.num_waiting

    @property
    def num_free_blocks(self) -> int:
        return self.scheduler.pool.num_free

    @property
    def totals(self) -> SchedulerStats:
        """Running totals since the start."""
        return self.scheduler.stats

    def load(self) -> EngineLoad:
        """How busy the engine is now, in O(1)."""
        scheduler, pool = self.scheduler, self.scheduler.pool
        return EngineLoad(
            scheduler.num_running, scheduler.num_waiting, scheduler.num_deferred, pool.num_free, pool.num_free_cached
        )

    def has_started(self, request_id: str) -> bool:
        """Whether a request has left the queue, if only with one of its choices, or is not here at all."""
        group = self._groups.get(request_id)
        return group is None or any(choice.request.scheduled_time for choice in group.choices)

    def progress(self, request_ids: Collection[str]) -> list[RequestProgress]:
        """How far those of `request_ids` are that wait or have their prompt computed; one pass over the queue."""
        positions: dict[str, int] = {}
        for request in self.scheduler.waiting():
            owner, _ = self._owners[request.request_id]
            positions.setdefault(owner.request_id, len(positions) + 1)
        found = []
        for request_id in request_ids:
            group = self._groups.get(request_id)
            if group is None or group.choices[0].request.first_token_time:
                continue
            first = group.choices[0].request
            # Its other choices may wait, for the first one's prompt or for room: the first tells how far it is.
            position = None if first.block_ids else positions.get(request_id)
            num_computed = min(first.num_computed_tokens, first.num_prompt_tokens)
            found.append(RequestProgress(request_id, position, first.num_prompt_tokens, num_computed))
        return found

    def check_integrity(self) -> None:
        """Assert that scheduler, pool and this engine agree; for tests."""
        self.scheduler.check_integrity()
        owned = {c.request.request_id for g in self._groups.values() for c in g.choices if not c.request.finished}
        assert owned == {i for i, (_, c) in self._owners.items() if not c.request.finished}

    # Taking requests

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
        """Tokenize and check a prompt. Thread-safe; touches no engine state.

        Args:
            prompt: text, or token ids.
            cache_salt: requests with different salts never share cached blocks.
            add_special_tokens: let the tokenizer add its BOS (not for text that a chat template made).
            arrival_time: when the request came, of `time.monotonic`; None for now.
            grammar: what the answer must look like; None compiles what `params` ask for, which may take seconds.

        Raises:
            RequestError: naming the field, what was found and what was expected.
        """
        arrival_time = time.monotonic() if arrival_time is None else arrival_time
        text, token_ids = self._read_prompt(prompt, add_special_tokens)
        self._check_prompt(token_ids, num_output=1)
        self._check_token_params(params)
        if grammar is None and params.structured_outputs is not None:
            grammar = self.compile_grammar(source_of(params.structured_outputs))
        if grammar is not None and params.allowed_token_ids is not None:
            raise RequestError("allowed_token_ids and structured output exclude each other", param="allowed_token_ids")
        # From here on the grammar stands for what was asked: it need not travel with the parameters.
        own_params = replace(params, structured_outputs=None)
        room = self.info.max_model_len - len(token_ids)
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        base_seed = self._next_seed() if params.seed is None else params.seed
        choices: list[Choice] = []
        for index in range(params.n):
            request = Request(
                request_id=request_id if params.n == 1 else f"{request_id}#{index}",
                prompt_token_ids=token_ids,
                params=own_params,
                eos_token_ids=self._eos_token_ids,
                max_tokens=max_tokens,
                seed=(base_seed + index) % 2**63,
                cache_salt=cache_salt,
                follows=choices[0].request if choices else None,
                arrival_time=arrival_time,
                grammar=None if grammar is None else _begin(grammar, params),
            )
            choices.append(self._make_choice(request))
        prompt_logprobs: list[PositionLogprobs | None] | None = [None] if params.prompt_logprobs is not None else None
        return PendingRequest(request_id, text, token_ids, params, choices, prompt_logprobs)

    def make_embedding_request(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        *,
        pooling: Pooling = "last",
        normalize: bool = True,
        cache_salt: str = "",
        add_special_tokens: bool = True,
        arrival_time: float | None = None,
    ) -> PendingRequest:
        """A request for the vector of a text, the hidden states after the final norm pooled. It never samples.

        Thread-safe; the other arguments are those of `make_request`.

        Args:
            pooling: the last token's state, or the mean over all tokens.
            normalize: scale the vector to length 1.

        Raises:
            RequestError: naming the field, what was found and what was expected.
        """
        if pooling not in ("last", "mean"):
            raise RequestError(f"pooling is {pooling!r}, expected 'last' or 'mean'", param="pooling")
        text, token_ids = self._read_prompt(prompt, add_special_tokens)
        self._check_prompt(token_ids, num_output=0)
        params = SamplingParams(detokenize=False)
        request = Request(
            request_id=request_id,
            prompt_token_ids=token_ids,
            params=params,
            max_tokens=0,
            cache_salt=cache_salt,
            arrival_time=time.monotonic() if arrival_time is None else arrival_time,
            pooling=pooling,
        )
        choices = [self._make_choice(request)]
        return PendingRequest(request_id, text, token_ids, params, choices, normalizes=normalize)

    def compile_grammar(self, source: GrammarSource) -> CompiledGrammar:
        """A grammar for `make_request`. Thread-safe; may take seconds, so neither for the event loop nor for a step.

        Raises:
            RequestError: it is no valid grammar, or too costly. EngineDeadError: the engine was shut down.
            TooSlowError: it was given up, as the computer is busy.
        """
        with self._grammars_lock:
            self._check_alive()
            if self._grammars is None:
                module = import_late("qengine.grammars.compiler", needed_for="structured output")
                self._grammars = module.GrammarCompiler(self._vocabulary)
            compiler = self._grammars
        return compiler.compile(source)

    def _vocabulary(self) -> Vocabulary:
        if not self._eos_token_ids:
            raise RequestError("this model has no end-of-sequence token, so structured output could not end")
        module = import_late("qengine.grammars.vocabulary", needed_for="structured output")
        vocabulary: Vocabulary = module.Vocabulary.of(self.tokenizer, self.info.vocab_size, self._eos_token_ids)
        return vocabulary

    def _make_choice(self, request: Request) -> Choice:
        params = request.params
        detokenizer = None
        if params.detokenize:
            detokenizer = IncrementalDetokenizer(
                self.tokenizer,
                prompt_token_ids=request.prompt_token_ids,
                skip_special_tokens=params.skip_special_tokens,
                stop=params.stop_strings,
                include_stop_str=params.include_stop_str_in_output,
                min_tokens=params.min_tokens,
            )
        wants_logprobs = params.logprobs is not None
        return Choice(request, detokenizer, 0, [] if wants_logprobs else None, 0.0 if wants_logprobs else None)

    def _read_prompt(self, prompt: str | Sequence[int], add_special_tokens: bool) -> tuple[str | None, list[int]]:
        """A prompt's text, if it is one, and its token ids."""
        if isinstance(prompt, str):
            return prompt, self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
        return None, list(prompt)

    def _check_prompt(self, token_ids: Sequence[int], *, num_output: int) -> None:
        if not token_ids:
            raise RequestError("the prompt is empty; give at least one token", param="prompt")
        vocab = self.info.vocab_size
        for token_id in token_ids:
            if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < vocab:
                raise RequestError(
                    f"the prompt has token id {token_id!r}, expected whole numbers from 0 to {vocab - 1}",
                    param="prompt",
                )
        limit = self.info.max_model_len
        if len(token_ids) + num_output > limit:
            output = " including at least one generated token" if num_output else ""
            raise RequestError(
                f"the prompt has {len(token_ids)} tokens, but the context holds {limit}{output}; "
                "shorten the prompt or raise --max-model-len",
                param="prompt",
                code="context_length_exceeded",
            )

    def _check_token_params(self, params: SamplingParams) -> None:
        vocab = self.info.vocab_size
        named = {
            "logit_bias": list(params.logit_bias or ()),
            "allowed_token_ids": list(params.allowed_token_ids or ()),
            "stop_token_ids": list(params.stop_token_ids or ()),
        }
        for name, token_ids in named.items():
            for token_id in token_ids:
                if token_id >= vocab:
                    raise RequestError(
                        f"{name} names token id {token_id}, but the vocabulary ends at {vocab - 1}", param=name
                    )
        self._check_some_token_is_allowed(params)
        if params.stop_strings and not params.detokenize:
            raise RequestError("stop strings need detokenize=True", param="stop")

    def _check_some_token_is_allowed(self, params: SamplingParams) -> None:
        if params.allowed_token_ids is None or not params.min_tokens:
            return
        if set(params.allowed_token_ids) <= self._eos_token_ids | set(params.stop_token_ids or ()):
            raise RequestError(
                "allowed_token_ids names only tokens that end the answer, but min_tokens forbids those at first; "
                "allow another token or set min_tokens to 0",
                param="allowed_token_ids",
            )

    def _next_seed(self) -> int:
        """A seed for a request that gave none: a fixed sequence per engine seed."""
        digest = hashlib.blake2b(f"{self._seed}:{next(self._unseeded)}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    # Running

    def add(self, pending: PendingRequest) -> None:
        """Queue a request.

        Raises:
            RequestError: if its id is in use or it can never fit the KV cache.
            EngineDeadError: after an internal failure.
        """
        self._check_alive()
        ids = [choice.request.request_id for choice in pending.choices]
        if pending.request_id in self._groups or any(i in self._owners for i in ids):
            raise RequestError(f"request id '{pending.request_id}' is already in use", param="request_id")
        added: list[Request] = []
        try:
            for choice in pending.choices:
                self.scheduler.add(choice.request)
                added.append(choice.request)
        except RequestError:
            for request in added:
                self.scheduler.abort(request.request_id)
            raise
        self._groups[pending.request_id] = pending
        now = time.monotonic()
        for choice in pending.choices:
            choice.request.queued_time = now
            self._owners[choice.request.request_id] = (pending, choice)

    def abort(self, request_id: str) -> None:
        """Drop a request and free its blocks, at any moment. Unknown and finished ids are ignored."""
        group = self._groups.pop(request_id, None)
        if group is None:
            return
        unfinished = [choice.request for choice in group.choices if not choice.request.finished]
        for choice in group.choices:
            self._owners.pop(choice.request.request_id, None)
            self.scheduler.abort(choice.request.request_id)
        if self.observer is not None:
            self.observer.on_abort(unfinished)

    def step(self) -> list[RequestOutput]:
        """Finish one step and return the requests that progressed, each with all it has so far.

        Where the executor works on several steps at once, others stay in flight.

        Raises:
            Exception: whatever the model raised; the engine is dead afterwards.
        """
        self._check_alive()
        if not self.has_unfinished:
            return []
        try:
            stats, progressed = self._run_step()
        except KeyboardInterrupt:
            raise
        except BaseException:
            self._death = "the engine has stopped after an internal failure; restart it"
            raise
        touched: dict[str, PendingRequest] = {}
        for request in progressed:
            owner = self._owners.get(request.request_id)
            if owner is not None:
                group, choice = owner
                num_before = choice.num_fed
                self._advance(choice)
                stats.count(request, choice.num_fed - num_before)
                touched[group.request_id] = group
        outputs = [self._output(group) for group in touched.values()]
        stats.ended = time.monotonic()
        if self.observer is not None:
            self.observer.on_step(stats)
        return outputs

    def shutdown(self) -> None:
        """Release the model. Idempotent; requests in flight are dropped."""
        for request_id in list(self._groups):
            self.abort(request_id)
        self._in_flight.clear()
        with self._grammars_lock:
            self._death = self._death or "the engine has been shut down; start a new one"
            if self._grammars is not None:
                self._grammars.close()
        self._executor.shutdown()

    def _check_alive(self) -> None:
        if self._death is not None:
            raise EngineDeadError(self._death)

    def _run_step(self) -> tuple[StepStats, list[Request]]:
        """Hand out as many steps as keep all devices busy, and take the oldest one in."""
        began = time.monotonic()
        scheduled = began
        while len(self._in_flight) < self._executor.max_in_flight:
            start = time.monotonic()
            batch = self._schedule()
            scheduled += time.monotonic() - start
            if batch is None:
                break
            self._begin_step(batch)
        progressed, seconds = self._take_in(*self._in_flight[0])
        stats = StepStats(began, scheduled, executed=time.monotonic(), collective_seconds=seconds)
        return stats, progressed

    def _take_in(self, batch: Batch, step: StepInFlight) -> tuple[list[Request], Sequence[float]]:
        """Wait for the oldest step; the requests that progressed, and what ranks spent in collectives."""
        try:
            result = step.finish()  # Interrupted, it stays in flight, and is finished with the next call.
        except StepMemoryError as error:
            self._in_flight.popleft()
            return self._back_off(batch, error), ()
        self._in_flight.popleft()
        return self.scheduler.update(batch, result), result.collective_seconds

    def _back_off(self, batch: Batch, error: StepMemoryError) -> list[Request]:
        """Go on with smaller steps; the request that had to end for it, if any."""
        failed = self.scheduler.back_off(batch)
        logger.warning(
            "out of memory in a step of %d tokens of %d sequences: %s; going on with smaller steps%s",
            *(batch.num_tokens, len(batch.entries), error),
            "" if failed is None else f", and without request {failed.request_id}, the largest of them",
        )
        if self.scheduler.is_starved:
            raise error
        return [] if failed is None else [failed]

    def _schedule(self) -> Batch | None:
        """None if there is nothing to hand out before a step in flight is finished."""
        batch = self.scheduler.schedule()
        if not batch:
            self.scheduler.discard(batch)
            return None
        self._stamp_admitted()
        if self.on_scheduled is not None:
            self.on_scheduled()
        return batch

    def _stamp_admitted(self) -> None:
        """Note when requests left the queue: the last time, if they were preempted before their first token."""
        now = time.monotonic()
        for request in self.scheduler.admitted:
            if not request.first_token_time:
                request.scheduled_time = now

    def _begin_step(self, batch: Batch) -> None:
        try:
            self._in_flight.append((batch, self._executor.begin(batch)))
        except StepMemoryError as error:
            self._in_flight.append((batch, _StepWithoutMemory(error)))
        except KeyboardInterrupt:
            # Nothing of the step counts: its tokens are computed again, if anyone still wants them.
            self.scheduler.discard(batch)
            raise

    def _advance(self, choice: Choice) -> None:
        """Turn a sequence's new tokens into text, and stop it at a stop string."""
        request = choice.request
        new_ids = request.output_token_ids[choice.num_fed :]
        if choice.logprobs is not None and choice.cumulative_logprob is not None:
            for record in request.output_logprobs[choice.num_fed :]:
                choice.logprobs.append(public_logprobs(record, self.tokenizer))
                choice.cumulative_logprob += record.logprob
        choice.num_fed += len(new_ids)
        if choice.detokenizer is None:
            return
        if request.finish_reason == "stop" and not request.params.include_stop_str_in_output:
            new_ids = new_ids[:-1]  # The token that ended it is not part of the text.
        choice.detokenizer.feed(new_ids)
        if request.finished:
            choice.detokenizer.finish()
        stop = choice.detokenizer.stop_reason
        if stop is None or request.finish_reason == "error":
            return
        if request.finished:
            request.finish_reason, request.stop_reason = "stop", stop
        else:
            self.scheduler.finish(request.request_id, "stop", stop)
            choice.detokenizer.finish()

    def _output(self, group: PendingRequest) -> RequestOutput:
        """The group's output so far; forgets the group once every choice has ended."""
        finished = all(c.request.finished for c in group.choices)
        if finished:
            self._groups.pop(group.request_id, None)
            for choice in group.choices:
                self._owners.pop(choice.request.request_id, None)
            if self.observer is not None:
                self.observer.on_group_end([choice.request for choice in group.choices])
        return output_of(group, self.tokenizer, finished=finished)


def _begin(grammar: CompiledGrammar, params: SamplingParams) -> GrammarState:
    try:
        return grammar.start(stop_token_ids=frozenset(params.stop_token_ids or ()), min_tokens=params.min_tokens)
    except GrammarError as error:
        # It could be begun when it was compiled, but what has been found out since counts against its limits.
        raise RequestError(str(error), code=GRAMMAR_FAILED) from error
