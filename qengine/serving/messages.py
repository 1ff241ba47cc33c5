"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's way to ask for an answer, over the same path as chat.

Invariant: the events of a stream, applied in order, are what the same request gets without streaming. Errors have
Anthropic's shape on these routes, whichever layer finds them (`errors` does that).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from qengine.request import RequestOutput, RequestProgress
from qengine.serving.api_answers import AnthropicErrorBody, AnthropicMessage, MessageEvent, TokenCount
from qengine.serving.api_schema import described
from qengine.serving.chat_call import ChatCall
from qengine.serving.chat_form import ChatChoice
from qengine.serving.errors import ApiError, anthropic_error, json_response
from qengine.serving.generation import Delta, Job, Progress, follow, new_id, progress_body
from qengine.serving.messages_input import WORDS, chat_request
from qengine.serving.messages_output import Event, MessageOutput
from qengine.serving.messages_protocol import CountTokensRequest, MessagesRequest
from qengine.serving.reading import read_request
from qengine.serving.responses import PROGRESS_EVENT
from qengine.serving.service import service_of
from qengine.serving.streaming import Chunks, named_event_stream, while_connected

router = APIRouter()


@router.post(
    "/v1/messages",
    **described(
        tag="Generate", body=MessagesRequest, answer=AnthropicMessage, event=MessageEvent, error=AnthropicErrorBody
    ),
)
async def create_message(http: Request) -> Response:
    """Answer a conversation, in Anthropic's shape.

    If the conversation ends with an assistant's message, the answer goes on from there.
    """
    engine = service_of(http).ready_engine()
    request = await read_request(http, MessagesRequest)
    with WORDS.kept():
        chat = chat_request(request, engine.tokenizer)
        answer = _MessageAnswer(ChatCall(http, chat, id=new_id("msg", "_"), is_cut_to_fit=True), request)
        if request.stream:
            return await named_event_stream(http, answer.events())
        return json_response(await while_connected(http, answer.whole()))


@router.post(
    "/v1/messages/count_tokens",
    **described(tag="Text", body=CountTokensRequest, answer=TokenCount, error=AnthropicErrorBody),
)
async def count_tokens(http: Request) -> Response:
    """How many tokens the prompt of a message has, tools and all."""
    engine = service_of(http).ready_engine()
    request = await read_request(http, CountTokensRequest)
    with WORDS.kept():
        call = ChatCall(http, chat_request(request, engine.tokenizer), id=new_id("count", "_"))
        return json_response(
            {"input_tokens": await while_connected(http, engine.offload_text(call.count_prompt_tokens))}
        )


@dataclass(frozen=True, slots=True)
class _Gain:
    """What a report of the engine adds. `delta` has the reasons of an end; `is_cut` if it is one by the budget."""

    events: list[Event]
    delta: Delta
    output: RequestOutput
    is_cut: bool = False


class _MessageAnswer:
    """What one call answers."""

    def __init__(self, call: ChatCall, request: MessagesRequest) -> None:
        self._call = call
        self._request = request
        self._message: MessageOutput | None = None
        self._num_thinking = 0  # Tokens of thoughts that were ended because there were enough of them.
        self._prompt_counts: tuple[int, int] | None = None  # Tokens of the prompt, and those of them from the cache.
        self._has_begun = False

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        last: _Gain | None = None
        async with aclosing(self._gains()) as gains:
            async for gain in gains:
                if isinstance(gain, _Gain):
                    last = gain
        assert last is not None
        assert self._message is not None
        self._message.finish()
        return {**self._head(last.output), "content": self._message.blocks, **self._end(last)}

    async def events(self) -> AsyncGenerator[Chunks, None]:
        """The answer as it comes. What goes wrong after the first event is the last one."""
        try:
            async with aclosing(self._events()) as batches:
                async for batch in batches:
                    self._has_begun = True
                    yield batch
        except Exception as error:  # The status is sent: the stream itself must carry any error.
            problem = WORDS.renamed(error)
            if not self._has_begun:
                raise problem from error
            yield [anthropic_error(problem)]

    async def _events(self) -> AsyncGenerator[list[Event], None]:
        last: _Gain | None = None
        async with aclosing(self._gains()) as gains:
            async for gain in gains:
                if isinstance(gain, RequestProgress):
                    yield [{"type": PROGRESS_EVENT, "progress": progress_body(gain)}]
                    continue
                head = [] if last else [{"type": "message_start", "message": self._head(gain.output)}]
                last = gain
                if events := [*head, *gain.events]:
                    yield events
        assert last is not None
        assert self._message is not None
        end = self._end(last)
        delta = {"stop_reason": end["stop_reason"], "stop_sequence": end["stop_sequence"]}
        ended = {"type": "message_delta", "delta": delta, "usage": end["usage"]}
        yield [*self._message.finish(), ended, {"type": "message_stop"}]

    async def _gains(self) -> AsyncGenerator[_Gain | RequestProgress, None]:
        """What the engine reports, as events. Thoughts that fill their budget are ended and the answer begun.

        Both have one place in the queue: once begun, an answer is neither turned away nor forgotten by a drain.
        """
        with self._call.engine.admission.reserve(1):
            async with aclosing(self._parts()) as gains:
                async for gain in gains:
                    yield gain

    async def _parts(self) -> AsyncGenerator[_Gain | RequestProgress, None]:
        cut: _Gain | None = None
        async with aclosing(self._follow(self._call.job, self._budget)) as gains:
            async for gain in gains:
                if isinstance(gain, _Gain):
                    self._usage(gain.output)  # The prompt is counted before thoughts are added to it.
                    cut = gain if gain.is_cut else None
                yield gain
        if cut is None:
            return
        self._num_thinking = len(cut.output.outputs[0].token_ids)
        async with aclosing(self._follow(self._after_thoughts(cut.output), None)) as gains:
            async for gain in gains:
                yield gain

    @property
    def _budget(self) -> int | None:
        return self._request.thinking.budget_tokens if self._request.thinking is not None else None

    async def _follow(self, job: Job, budget: int | None) -> AsyncGenerator[_Gain | RequestProgress, None]:
        """Ends early if thoughts have taken `budget` tokens."""
        progress = Progress()
        choice: ChatChoice | None = None
        wants_progress = self._request.include_progress and not self._has_begun
        reports = follow(self._call.engine, job, wants_progress=wants_progress, is_admitted=True)
        async with aclosing(reports):
            async for _, report in reports:
                if isinstance(report, RequestProgress):
                    yield report
                    continue
                # Only now is the prompt known, and with it what answers look like.
                choice = choice or self._call.form.new_choice()
                self._message = self._message or MessageOutput(choice.new_call_id)
                if budget is not None and len(report.outputs[0].token_ids) >= budget:
                    cut = self._first_tokens(report, budget)
                    delta = progress.advance(cut.outputs[0])
                    events = self._message.feed(choice.pieces(delta))
                    if choice.is_thinking:
                        yield _Gain(events, delta, cut, is_cut=True)
                        return
                    budget = None
                    yield _Gain(events, delta, cut)
                delta = progress.advance(report.outputs[0])
                yield _Gain(self._message.feed(choice.pieces(delta)), delta, report)

    def _first_tokens(self, output: RequestOutput, num_tokens: int) -> RequestOutput:
        """An output as it was when it had so many tokens: the engine may be ahead of who reads."""
        whole = output.outputs[0]
        token_ids = whole.token_ids[:num_tokens]
        skips = self._call.job.params.skip_special_tokens
        text = self._call.engine.tokenizer.decode(token_ids, skip_special_tokens=skips)
        num_chars = len(text.rstrip("\ufffd"))  # The last character may be cut.
        cut = replace(whole, text=whole.text[:num_chars], token_ids=token_ids, finish_reason=None, stop_reason=None)
        return replace(output, outputs=[cut], finished=False)

    def _after_thoughts(self, output: RequestOutput) -> Job:
        """The same job from the end of the thoughts on, which are closed as the model would have closed them."""
        job, thoughts = self._call.job, output.outputs[0].text.rstrip()
        prompt = f"{output.prompt}{thoughts}\n{self._call.form.thoughts_end}\n\n"
        left = max(1, self._request.max_tokens - self._num_thinking)
        params = replace(job.params, max_tokens=left)
        # It came when the first one did: one --request-timeout is for both.
        return replace(job, prompts=lambda: [prompt], params=params, id=f"{job.id}-answer", is_continued=True)

    # The message

    def _head(self, output: RequestOutput) -> dict[str, Any]:
        return {
            "id": self._call.job.id,
            "type": "message",
            "role": "assistant",
            "model": self._call.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(output),
        }

    def _end(self, last: _Gain) -> dict[str, Any]:
        """What is known at the end. Raises ApiError (504) if --request-timeout was it."""
        reason, sequence = self._stop_reason(last), None
        if reason == "stop_sequence":
            sequence = last.delta.stop_reason
        return {"stop_reason": reason, "stop_sequence": sequence, "usage": self._usage(last.output)}

    def _stop_reason(self, last: _Gain) -> str:
        assert self._message is not None
        if last.delta.finish_reason == "length":
            is_asked = self._num_tokens(last.output) >= self._request.max_tokens
            return "max_tokens" if is_asked else "model_context_window_exceeded"
        if last.delta.finish_reason != "stop":
            raise ApiError(504, "the request took longer than it may and was stopped")
        if isinstance(last.delta.stop_reason, str):
            return "stop_sequence"
        return "tool_use" if self._message.has_calls else "end_turn"

    def _num_tokens(self, output: RequestOutput) -> int:
        return self._num_thinking + len(output.outputs[0].token_ids)

    def _usage(self, output: RequestOutput) -> dict[str, Any]:
        """Anthropic's token counts: those of the prompt that were in the cache are counted apart."""
        if self._prompt_counts is None:
            self._prompt_counts = len(output.prompt_token_ids), output.num_cached_tokens
        num_prompt, num_cached = self._prompt_counts
        return {
            "input_tokens": num_prompt - num_cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": num_cached,
            "output_tokens": self._num_tokens(output),
        }
