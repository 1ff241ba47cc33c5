"""From a checked request to the engine's outputs; what chat and completions have in common.

Invariant: a Job holds its place in the queue from before its prompts are tokenized until its outputs end or its caller
leaves, and nothing of it is left in the engine afterwards. It knows nothing of the shape of answers.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.requests import Request

from qengine.engine import PendingRequest
from qengine.errors import RequestError
from qengine.grammars.compiler import CompiledGrammar
from qengine.request import (
    GRAMMAR_FAILED,
    CompletionOutput,
    PositionLogprobs,
    RequestOutput,
    RequestProgress,
    SamplingParams,
)
from qengine.serving.admission import RequestTimeoutError
from qengine.serving.async_engine import AsyncEngine
from qengine.serving.errors import ApiError, invalid
from qengine.serving.limits import LIMITS
from qengine.serving.logprobs import SLICE_POSITIONS
from qengine.serving.protocol import GenerationRequest, Prompt
from qengine.serving.structured import Form

_SAMPLING_FIELDS = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("n", "seed", "min_tokens", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos"),
    *("skip_special_tokens", "logit_bias", "allowed_token_ids"),
)


def sampling_params(request: GenerationRequest, defaults: Mapping[str, Any], **more: Any) -> SamplingParams:
    """The model's defaults, then what the request gives, then `more`.

    Raises:
        RequestError: a combination that is not possible.
    """
    given = {name: getattr(request, name) for name in _SAMPLING_FIELDS if getattr(request, name) is not None}
    return SamplingParams(**{**defaults, **given, **more})


def check_num_logprobs(found: int | None, param: str, limit: int) -> None:
    """Raise ApiError (400) for more log-probabilities per token than --max-logprobs."""
    if found is not None and found > limit:
        raise invalid(f"{param} is {found}, expected at most {limit} (--max-logprobs)", param=param)


def cache_salt(http: Request, own: str | None) -> str:
    """What separates this request's prefix cache from others': its API key's salt and the one it brings."""
    parts = [getattr(http.state, "cache_salt", ""), own or ""]
    return "/".join(parts) if any(parts) else ""


def trace_parent(http: Request) -> str | None:
    """The trace that the caller wants this call to be part of; what is no such header is ignored by who reads it."""
    return http.headers.get("traceparent")


@dataclass(frozen=True, slots=True)
class Job:
    """One call: its prompts and how to continue them.

    Attributes:
        prompts: makes the prompts; may be slow (templates), so it runs off the event loop.
        prompt_param: the field that holds the prompts, for errors.
        form: from the finished prompts to the form that answers must have; None for free text.
        logprobs_param: the field that says how many log-probabilities are told of each position, for errors.
        is_continued: this goes on with an answer that was begun, so that it is not timed out in the queue.
        arrival_time: by the monotonic clock; --request-timeout counts from here, whatever was waited for.
        token_limit: tokens that the client asked for explicitly; more than the context holds is an error.
        traceparent: the caller's trace, if it sent one.
    """

    prompts: Callable[[], Sequence[Prompt]]
    num_prompts: int
    prompt_param: str
    params: SamplingParams
    token_limit: int | None
    add_special_tokens: bool
    cache_salt: str
    id: str
    traceparent: str | None = None
    form: Callable[[Sequence[Prompt]], Form | None] | None = None
    logprobs_param: str = "logprobs"
    is_continued: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    arrival_time: float = field(default_factory=time.monotonic)


def new_id(prefix: str, separator: str = "-") -> str:
    """A fresh id such as "chatcmpl-0123...": answers carry it."""
    return f"{prefix}{separator}{uuid.uuid4().hex}"


def check_prompt_chars(num_chars: int, max_model_len: int, param: str) -> None:
    """Refuse text that is too long for any tokenizer to make it fit, before a tokenizer spends time on it."""
    limit = max_model_len * LIMITS.prompt_chars_per_token
    if num_chars > limit:
        raise invalid(
            f"the prompt has {num_chars} characters, but the context of {max_model_len} tokens takes at most {limit}; "
            "shorten it",
            param=param,
            code="string_above_max_length",
        )


async def _compile(engine: AsyncEngine, form: Form) -> CompiledGrammar:
    """The grammar of the form that is asked for; compiled before any sequence is the engine's."""
    try:
        return await engine.compile_grammar(form.source)
    except RequestError as error:
        raise RequestError(str(error), param=form.param, code=error.code) from error


def _prepare(
    engine: AsyncEngine, job: Job, prompts: Sequence[Prompt], grammar: CompiledGrammar | None
) -> list[PendingRequest]:
    """Tokenize and check every prompt. Runs in a thread."""
    pending: list[PendingRequest] = []
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            check_prompt_chars(len(prompt), engine.info.max_model_len, job.prompt_param)
        try:
            request = engine.make_request(
                f"{job.id}-{index}",
                prompt,
                job.params,
                cache_salt=job.cache_salt,
                add_special_tokens=job.add_special_tokens,
                arrival_time=job.arrival_time,
                grammar=grammar,
            )
        except RequestError as error:
            raise _named(error, job) from error
        _check_token_limit(len(request.prompt_token_ids), job, engine.info.max_model_len)
        pending.append(request)
    _check_total_logprobs([len(request.prompt_token_ids) for request in pending], job, engine.info.max_model_len)
    return pending


def _check_total_logprobs(prompt_lens: Sequence[int], job: Job, max_model_len: int) -> None:
    """Refuse an answer that could be too large, before any of it is computed."""
    params = job.params
    total = 0
    for prompt_len in prompt_lens:
        room = max_model_len - prompt_len
        if params.logprobs is not None:
            num_tokens = params.n * min(room if params.max_tokens is None else params.max_tokens, room)
            total += num_tokens * (params.logprobs + 1)
        if params.prompt_logprobs is not None:  # Each of the choices tells them.
            total += params.n * prompt_len * (params.prompt_logprobs + 1)
    if total > LIMITS.num_logprobs:
        raise invalid(
            f"the answer could hold {total} log-probabilities, expected at most {LIMITS.num_logprobs}; ask for fewer "
            "at each token, for fewer tokens or choices, or send shorter prompts",
            param=job.logprobs_param if params.logprobs is not None else "prompt_logprobs",
        )


def _check_token_limit(prompt_len: int, job: Job, max_model_len: int) -> None:
    if job.token_limit is not None and prompt_len + job.token_limit > max_model_len:
        raise invalid(
            f"the context holds {max_model_len} tokens, but the request needs {prompt_len + job.token_limit}: "
            f"{prompt_len} of the prompt and max_tokens {job.token_limit}; shorten the prompt or lower max_tokens",
            param=job.prompt_param,
            code="context_length_exceeded",
        )


async def answer(engine: AsyncEngine, job: Job) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """The outputs as they come: (index of the prompt, cumulative output). Closing it aborts the job.

    Raises:
        RequestError, ApiError, QueueFullError, NotAcceptingError: refused. EngineDeadError: the engine stopped.
    """
    async with aclosing(follow(engine, job, wants_progress=False)) as reports:
        async for index, report in reports:
            assert isinstance(report, RequestOutput)
            yield index, report


async def follow(
    engine: AsyncEngine, job: Job, *, wants_progress: bool, is_admitted: bool = False
) -> AsyncGenerator[tuple[int, RequestOutput | RequestProgress], None]:
    """The same, with the progress of each prompt before its outputs if it is wanted.

    `is_admitted`: the caller holds the place in the queue.
    """
    with nullcontext() if is_admitted else engine.admission.reserve(job.num_prompts * job.params.n):
        pending = await engine.in_time(_pending(engine, job), job.arrival_time)
        indices = {request.request_id: index for index, request in enumerate(pending)}
        latest: dict[str, RequestOutput] = {}
        try:
            watching = engine.watch(
                pending, wants_progress=wants_progress, arrival_time=job.arrival_time, is_continued=job.is_continued
            )
            async with aclosing(watching) as reports:
                async for report in reports:
                    if isinstance(report, RequestOutput):
                        latest[report.request_id] = report
                        if report.error is not None:
                            raise _failure(report)
                    yield indices[report.request_id], report
        except RequestError as error:
            raise _named(error, job) from error
        finally:
            _trace(engine, job, list(latest.values()))


async def _pending(engine: AsyncEngine, job: Job) -> list[PendingRequest]:
    """The requests of a call, ready for the engine.

    One trip to a thread where no grammar is wanted: each costs a waiting client half a millisecond on a busy core.
    """

    def begin() -> tuple[Sequence[Prompt], Form | None, list[PendingRequest]]:
        prompts = job.prompts()
        form = None if job.form is None else job.form(prompts)
        return prompts, form, _prepare(engine, job, prompts, None) if form is None else []

    prompts, form, pending = await engine.offload(begin)
    if form is None:
        return pending
    grammar = await _compile(engine, form)
    return await engine.offload(lambda: _prepare(engine, job, prompts, grammar))


def _named(error: RequestError, job: Job) -> RequestError:
    """The same error with the prompt called what it is called in the request."""
    param = job.prompt_param if error.param == "prompt" else error.param
    return RequestError(str(error), param=param, code=error.code)


def _failure(output: RequestOutput) -> ApiError:
    """What a request that failed in the engine is told; a grammar that nobody can follow is its own fault."""
    status = 400 if output.error_code == GRAMMAR_FAILED else 500
    return ApiError(status, f"the request failed: {output.error}", code=output.error_code or "generation_failed")


def _trace(engine: AsyncEngine, job: Job, outputs: list[RequestOutput]) -> None:
    if engine.tracer is not None:
        is_whole = len(outputs) == job.num_prompts and all(o.finished and o.error is None for o in outputs)
        engine.tracer.record(
            job.id,
            engine.model_name,
            job.params,
            job.arrival_time,
            outputs,
            traceparent=job.traceparent,
            failed=not is_whole,
        )


async def final_outputs(engine: AsyncEngine, job: Job) -> list[RequestOutput]:
    """The whole answers, in the order of the prompts. Raises as `answer`.

    What --request-timeout stops is returned as far as it came, with "abort" as its finish reason.
    """
    latest: dict[int, RequestOutput] = {}
    try:
        async with aclosing(answer(engine, job)) as outputs:
            async for index, output in outputs:
                latest[index] = output
    except RequestTimeoutError:
        if len(latest) < job.num_prompts:
            raise
        latest = {index: _cut_short(output) for index, output in latest.items()}
    return [latest[index] for index in sorted(latest)]


def _cut_short(output: RequestOutput) -> RequestOutput:
    choices = [choice if choice.finished else replace(choice, finish_reason="abort") for choice in output.outputs]
    return replace(output, outputs=choices, finished=True)


def progress_body(progress: RequestProgress) -> dict[str, Any]:
    """What clients see of it."""
    return {
        "state": "running" if progress.queue_position is None else "waiting",
        "queue_position": progress.queue_position,
        "prompt_tokens": progress.num_prompt_tokens,
        "computed_tokens": progress.num_computed_tokens,
    }


def usage(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """OpenAI's token counts. A prompt counts once, however many choices continue it."""
    num_prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    num_output_tokens = sum(len(choice.token_ids) for output in outputs for choice in output.outputs)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": num_prompt_tokens + num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(output.num_cached_tokens for output in outputs)},
    }


@dataclass(frozen=True, slots=True)
class Delta:
    """What a choice gained since the last look. `finish_reason` is set once, at its end.

    Of a position whose log-probabilities nobody knows, the first of a prompt, there is None.
    """

    text: str
    token_ids: list[int]
    logprobs: list[PositionLogprobs | None] | None
    finish_reason: str | None
    stop_reason: int | str | None

    def slices(self) -> Iterator[Delta]:
        """The same in pieces of few log-probabilities: the text comes with the first, the end with the last."""
        if self.logprobs is None or len(self.token_ids) <= SLICE_POSITIONS:
            yield self
            return
        starts = range(0, len(self.token_ids), SLICE_POSITIONS)
        for start in starts:
            stop, is_last = start + SLICE_POSITIONS, start == starts[-1]
            yield Delta(
                text="" if start else self.text,
                token_ids=self.token_ids[start:stop],
                logprobs=self.logprobs[start:stop],
                finish_reason=self.finish_reason if is_last else None,
                stop_reason=self.stop_reason if is_last else None,
            )

    @property
    def is_shown(self) -> bool:
        """Whether there is something to send beside the end."""
        return bool(self.text or (self.logprobs is not None and self.token_ids))


def in_turns(deltas: Iterable[tuple[int, Delta]]) -> Iterator[list[tuple[int, Delta]]]:
    """What to tell together of the choices: everything, unless that are many log-probabilities.

    Others should get their turn between them, so that the event loop is not held up.
    """
    turn: list[tuple[int, Delta]] = []
    num_positions = 0
    for index, delta in deltas:
        for part in delta.slices():
            num_more = 0 if part.logprobs is None else len(part.token_ids)
            if turn and num_positions + num_more > SLICE_POSITIONS:
                yield turn
                turn, num_positions = [], 0
            turn.append((index, part))
            num_positions += num_more
    yield turn


@dataclass(slots=True)
class Progress:
    """How much of a choice has been sent."""

    num_chars: int = 0
    num_tokens: int = 0
    is_finished: bool = False

    def advance(self, choice: CompletionOutput) -> Delta:
        """What is new in the cumulative `choice`. After its end nothing ever is."""
        ends_now = choice.finished and not self.is_finished
        delta = Delta(
            text=choice.text[self.num_chars :],
            token_ids=choice.token_ids[self.num_tokens :],
            logprobs=None if choice.logprobs is None else [*choice.logprobs[self.num_tokens :]],
            finish_reason=choice.finish_reason if ends_now else None,
            stop_reason=choice.stop_reason if ends_now else None,
        )
        self.num_chars, self.num_tokens = len(choice.text), len(choice.token_ids)
        self.is_finished = choice.finished
        return delta
