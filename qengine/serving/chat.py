"""POST /v1/chat/completions.

Invariant: the deltas of a stream, joined, are the text of the same request without streaming. What a message may hold
is protocol's business, how it becomes a prompt the tokenizer's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from qengine.request import RequestOutput, RequestProgress
from qengine.serving.api_answers import ChatCompletion, ChatCompletionChunk
from qengine.serving.api_schema import described
from qengine.serving.chat_call import ChatCall
from qengine.serving.chat_form import ChatChoice
from qengine.serving.generation import Delta, Progress, final_outputs, follow, in_turns, new_id, progress_body, usage
from qengine.serving.large_json import answer_with_logprobs
from qengine.serving.logprobs import prompt_logprobs
from qengine.serving.protocol import ChatCompletionRequest
from qengine.serving.reading import read_request
from qengine.serving.service import service_of
from qengine.serving.streaming import Chunks, event_stream, while_connected

router = APIRouter()


@router.post(
    "/v1/chat/completions",
    **described(tag="Generate", body=ChatCompletionRequest, answer=ChatCompletion, event=ChatCompletionChunk),
)
async def create_chat_completion(http: Request) -> Response:
    """Answer a conversation."""
    service = service_of(http)
    service.ready_engine()
    request = await read_request(http, ChatCompletionRequest)
    # The state is looked at again: reading the body may have taken long enough for it to change.
    answers = _ChatAnswers(ChatCall(http, request, id=new_id("chatcmpl")))
    if request.stream:
        return await event_stream(http, answers.chunks())
    return await while_connected(http, answers.whole())


class _ChatAnswers:
    """What one call answers, in OpenAI's shape."""

    def __init__(self, call: ChatCall) -> None:
        self._call = call
        self._wants_usage = call.request.include_usage

    async def whole(self) -> Response:
        """The answer in one piece."""
        (output,) = await final_outputs(self._call.engine, self._call.job)
        return await answer_with_logprobs(
            self._call.engine, lambda: self._whole(output), self._call.num_logprobs(output)
        )

    def _whole(self, output: RequestOutput) -> dict[str, Any]:
        choices = [self._whole_choice(choice.index, Progress().advance(choice)) for choice in output.outputs]
        answer = {**self._head("chat.completion"), "choices": choices, "usage": usage([output])}
        if output.prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs(self._call.engine.tokenizer, output.prompt_logprobs)
        return answer

    def _whole_choice(self, index: int, delta: Delta) -> dict[str, Any]:
        choice = self._call.form.new_choice()
        return {
            "index": index,
            "message": choice.message(delta),
            "logprobs": self._call.logprobs(delta),
            "finish_reason": choice.finish_reason(delta.finish_reason),
            "stop_reason": delta.stop_reason,
        }

    async def chunks(self) -> AsyncGenerator[Chunks, None]:
        """The answer as it comes: roles, pieces of text, ends, and the token counts if wanted."""
        progress = [Progress() for _ in range(self._call.job.params.n)]
        parts: list[ChatChoice] = []
        last: RequestOutput | None = None
        wants_progress = self._call.request.include_progress
        async with aclosing(follow(self._call.engine, self._call.job, wants_progress=wants_progress)) as reports:
            async for _, output in reports:
                if isinstance(output, RequestProgress):
                    yield [self._progress_chunk(output)]
                    continue
                role = {"role": "assistant", "content": ""}
                chunks = [] if last else [self._chunk(index, role) for index in range(len(progress))]
                # Only now is the prompt known, and with it what answers look like.
                parts = parts or [self._call.form.new_choice() for _ in progress]
                last = output
                deltas = [(choice.index, progress[choice.index].advance(choice)) for choice in output.outputs]
                for number, turn in enumerate(in_turns(deltas)):
                    if number:
                        await asyncio.sleep(0)
                    for index, delta in turn:
                        chunks += self._choice_chunks(index, parts[index], delta)
                    if chunks:
                        yield chunks
                    chunks = []
        if last is not None and self._wants_usage:
            yield [{**self._head("chat.completion.chunk"), "choices": [], "usage": usage([last])}]

    def _progress_chunk(self, progress: RequestProgress) -> dict[str, Any]:
        """A chunk without choices, like that of the token counts, which clients know how to pass over."""
        chunk = {**self._head("chat.completion.chunk"), "choices": [], "progress": progress_body(progress)}
        return {**chunk, "usage": None} if self._wants_usage else chunk

    def _choice_chunks(self, index: int, choice: ChatChoice, delta: Delta) -> list[dict[str, Any]]:
        """New text, then the end: together in one chunk they confuse clients."""
        parts = choice.deltas(delta)
        if not parts and delta.logprobs is not None and delta.token_ids:
            parts = [{"content": ""}]
        chunks = [self._chunk(index, part) for part in parts]
        if chunks:
            chunks[0]["choices"][0]["logprobs"] = self._call.logprobs(delta)
        if delta.finish_reason is not None:
            end = {"finish_reason": choice.finish_reason(delta.finish_reason), "stop_reason": delta.stop_reason}
            chunks.append(self._chunk(index, {}, **end))
        return chunks

    def _chunk(self, index: int, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        chunk = {**self._head("chat.completion.chunk"), "choices": [choice]}
        return {**chunk, "usage": None} if self._wants_usage else chunk

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._call.job.id, "object": kind, "created": self._call.job.created, "model": self._call.model}
