"""POST /v1/completions: continue one prompt or several, as text or token ids.

Invariant: choices are numbered prompt by prompt (choice c of prompt p is p * n + c); streamed pieces, joined, equal the
answer without streaming.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from qengine.request import CompletionOutput, RequestOutput, RequestProgress
from qengine.serving.api_answers import Completion
from qengine.serving.api_schema import described
from qengine.serving.async_engine import AsyncEngine
from qengine.serving.errors import invalid
from qengine.serving.generation import (
    Delta,
    Job,
    Progress,
    cache_salt,
    check_num_logprobs,
    check_prompt_chars,
    final_outputs,
    follow,
    in_turns,
    new_id,
    progress_body,
    sampling_params,
    trace_parent,
    usage,
)
from qengine.serving.large_json import answer_with_logprobs
from qengine.serving.logprobs import LegacyLogprobs, prompt_logprobs
from qengine.serving.protocol import CompletionRequest
from qengine.serving.reading import read_request
from qengine.serving.service import Service, service_of
from qengine.serving.streaming import Chunks, event_stream, while_connected
from qengine.serving.structured import form_of

router = APIRouter()

DEFAULT_MAX_TOKENS = 16


@router.post(
    "/v1/completions", **described(tag="Generate", body=CompletionRequest, answer=Completion, event=Completion)
)
async def create_completion(http: Request) -> Response:
    """Continue prompts."""
    service = service_of(http)
    service.ready_engine()
    request = await read_request(http, CompletionRequest)
    service.check_model(request.model)
    # Again: reading the body may have taken long enough for the server's state to change.
    call = _CompletionCall(
        service, service.ready_engine(), request, cache_salt(http, request.cache_salt), trace_parent(http)
    )
    if request.stream:
        return await event_stream(http, call.chunks())
    return await while_connected(http, call.whole())


@dataclass(frozen=True, slots=True)
class _Piece:
    """New text of a choice with its log-probabilities, and its end if it has come."""

    text: str
    logprobs: dict[str, Any] | None
    finish_reason: str | None
    stop_reason: int | str | None

    @property
    def is_shown(self) -> bool:
        return bool(self.text or (self.logprobs is not None and self.logprobs["tokens"]))


@dataclass(slots=True)
class _ChoiceState:
    """What has been sent of one choice."""

    legacy: LegacyLogprobs | None
    progress: Progress = field(default_factory=Progress)
    is_begun: bool = False


def _piece(state: _ChoiceState, gain: Delta) -> _Piece:
    logprobs = None if state.legacy is None else state.legacy.take(gain.token_ids, gain.logprobs or ())
    return _Piece(gain.text, logprobs, gain.finish_reason, gain.stop_reason)


class _CompletionCall:
    """One call and the shape of its answer."""

    def __init__(
        self, service: Service, engine: AsyncEngine, request: CompletionRequest, salt: str, traceparent: str | None
    ) -> None:
        check_num_logprobs(request.logprobs, "logprobs", service.max_logprobs)
        check_num_logprobs(request.prompt_logprobs, "prompt_logprobs", service.max_logprobs)
        echoed = request.logprobs if request.echo else None
        if None not in (echoed, request.prompt_logprobs) and echoed != request.prompt_logprobs:
            raise invalid(
                f"prompt_logprobs is {request.prompt_logprobs}, but echo tells {echoed} for each token of the prompt "
                "(logprobs); give the same number, or leave one out",
                param="prompt_logprobs",
            )
        for prompt in request.prompts:
            if isinstance(prompt, str):
                check_prompt_chars(len(prompt), engine.info.max_model_len, "prompt")
        self._engine = engine
        self._request = request
        self._model = service.model_names[0]
        form = form_of(request)
        self._job = Job(
            prompts=lambda: request.prompts,
            num_prompts=len(request.prompts),
            prompt_param="prompt",
            params=sampling_params(
                request,
                engine.info.default_sampling,
                max_tokens=request.max_tokens or max(DEFAULT_MAX_TOKENS, request.min_tokens or 0),
                logprobs=request.logprobs,
                prompt_logprobs=request.prompt_logprobs if echoed is None else echoed,
            ),
            token_limit=request.max_tokens,
            add_special_tokens=request.add_special_tokens is not False,
            cache_salt=salt,
            traceparent=traceparent,
            id=new_id("cmpl"),
            form=lambda prompts: form,
        )

    async def whole(self) -> Response:
        """The answer in one piece."""
        outputs = await final_outputs(self._engine, self._job)
        return await answer_with_logprobs(self._engine, lambda: self._whole(outputs), self._num_logprobs(outputs))

    def _num_logprobs(self, outputs: Sequence[RequestOutput]) -> int:
        params, total = self._job.params, 0
        for output in outputs:
            if params.prompt_logprobs is not None:
                total += len(output.prompt_token_ids) * len(output.outputs) * (params.prompt_logprobs + 1)
            if params.logprobs is not None:
                total += sum(len(choice.token_ids) for choice in output.outputs) * (params.logprobs + 1)
        return total

    def _whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        choices = []
        for prompt_index, output in enumerate(outputs):
            for choice in output.outputs:
                state = self._new_state(output)
                piece = _piece(state, self._gain(state, output, choice))
                shown = self._choice(prompt_index, choice.index, piece)
                if self._request.prompt_logprobs is not None:
                    shown["prompt_logprobs"] = prompt_logprobs(self._engine.tokenizer, output.prompt_logprobs or ())
                choices.append(shown)
        return {**self._head(), "choices": choices, "usage": usage(outputs)}

    async def chunks(self) -> AsyncGenerator[Chunks, None]:
        """The answer as it comes, the prompts' pieces mixed, and the token counts if wanted."""
        states: dict[int, list[_ChoiceState]] = {}
        latest: dict[int, RequestOutput] = {}
        wants_progress = self._request.include_progress
        async with aclosing(follow(self._engine, self._job, wants_progress=wants_progress)) as reports:
            async for prompt_index, output in reports:
                if isinstance(output, RequestProgress):
                    yield [self._progress_chunk(prompt_index, output)]
                    continue
                if prompt_index not in states:
                    states[prompt_index] = [self._new_state(output) for _ in output.outputs]
                latest[prompt_index] = output
                of_prompt = states[prompt_index]
                gains = [
                    (choice.index, self._gain(of_prompt[choice.index], output, choice)) for choice in output.outputs
                ]
                for number, turn in enumerate(in_turns(gains)):
                    if number:
                        await asyncio.sleep(0)
                    chunks: list[dict[str, Any]] = []
                    for index, gain in turn:
                        chunks += self._piece_chunks(prompt_index, index, _piece(of_prompt[index], gain))
                    if chunks:
                        yield chunks
        if self._request.include_usage:
            yield [{**self._head(), "choices": [], "usage": usage(list(latest.values()))}]

    def _new_state(self, output: RequestOutput) -> _ChoiceState:
        if self._request.logprobs is None:
            return _ChoiceState(None)
        continued = [] if self._request.echo else output.prompt_token_ids
        skips = self._job.params.skip_special_tokens
        return _ChoiceState(LegacyLogprobs(self._engine.tokenizer, continued, skip_special_tokens=skips))

    def _gain(self, state: _ChoiceState, output: RequestOutput, choice: CompletionOutput) -> Delta:
        """What is new in `choice`, with the prompt before it the first time if it is echoed."""
        delta = state.progress.advance(choice)
        is_first, state.is_begun = not state.is_begun, True
        if not (self._request.echo and is_first):
            return delta
        text = self._prompt_text(output) + delta.text
        if state.legacy is None:
            return replace(delta, text=text)
        token_ids = [*output.prompt_token_ids, *delta.token_ids]
        positions = [*(output.prompt_logprobs or ()), *(delta.logprobs or ())]
        return replace(delta, text=text, token_ids=token_ids, logprobs=positions)

    def _prompt_text(self, output: RequestOutput) -> str:
        if output.prompt is not None:
            return output.prompt
        skips = self._job.params.skip_special_tokens
        return self._engine.tokenizer.decode(output.prompt_token_ids, skip_special_tokens=skips)

    def _piece_chunks(self, prompt_index: int, index: int, piece: _Piece) -> list[dict[str, Any]]:
        """New text, then the end: together in one chunk they confuse clients."""
        chunks = []
        if piece.is_shown:
            chunks.append(
                self._chunk(self._choice(prompt_index, index, _Piece(piece.text, piece.logprobs, None, None)))
            )
        if piece.finish_reason is not None:
            end = _Piece("", None, piece.finish_reason, piece.stop_reason)
            chunks.append(self._chunk(self._choice(prompt_index, index, end)))
        return chunks

    def _progress_chunk(self, prompt_index: int, progress: RequestProgress) -> dict[str, Any]:
        """A chunk without choices, like that of the token counts, which clients know how to pass over."""
        chunk = {**self._head(), "choices": [], "progress": {"prompt_index": prompt_index, **progress_body(progress)}}
        return {**chunk, "usage": None} if self._request.include_usage else chunk

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = {**self._head(), "choices": [choice]}
        return {**chunk, "usage": None} if self._request.include_usage else chunk

    def _choice(self, prompt_index: int, index: int, piece: _Piece) -> dict[str, Any]:
        return {
            "index": prompt_index * self._job.params.n + index,
            "text": piece.text,
            "logprobs": piece.logprobs,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }

    def _head(self) -> dict[str, Any]:
        return {"id": self._job.id, "object": "text_completion", "created": self._job.created, "model": self._model}
