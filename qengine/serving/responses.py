"""POST /v1/responses: OpenAI's newer way to ask for an answer, over the same path as chat.

Invariant: the last event of a stream holds what the same request gets without streaming. Nothing is kept: a response
is gone when its answer ends, so there is none to get, to cancel or to continue by its id.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from qengine.request import RequestOutput, RequestProgress
from qengine.serving.api_answers import ResponseEvent, ResponseObject
from qengine.serving.api_schema import described
from qengine.serving.chat_call import ChatCall
from qengine.serving.chat_form import ChatChoice
from qengine.serving.errors import ApiError
from qengine.serving.generation import Delta, Progress, final_outputs, follow, in_turns, new_id, progress_body, usage
from qengine.serving.large_json import LOGPROBS_DEPTH, answer_with_logprobs
from qengine.serving.reading import read_request
from qengine.serving.responses_input import WORDS, chat_request
from qengine.serving.responses_output import Event, ResponseOutput
from qengine.serving.responses_protocol import ResponsesRequest
from qengine.serving.service import service_of
from qengine.serving.streaming import Chunks, named_event_stream, while_connected

#: Not one of OpenAI's, hence the prefix. Only those see it who asked.
PROGRESS_EVENT = "qengine:progress"

router = APIRouter()


@router.post(
    "/v1/responses",
    **described(tag="Generate", body=ResponsesRequest, answer=ResponseObject, event=ResponseEvent),
)
async def create_response(http: Request) -> Response:
    """Answer a conversation, as a list of output items.

    Nothing is kept: what came before is sent as input each time.
    """
    service_of(http).ready_engine()
    request = await read_request(http, ResponsesRequest)
    with WORDS.kept():
        call = ChatCall(http, chat_request(request), id=new_id("resp", "_"))
        answers = _ResponseAnswer(call, request)
        if request.stream:
            return await named_event_stream(http, answers.events())
        return await while_connected(http, answers.whole())


class _ResponseAnswer:
    """What one call answers."""

    def __init__(self, call: ChatCall, request: ResponsesRequest) -> None:
        self._call = call
        self._request = request
        self._output: ResponseOutput | None = None
        self._num_events = 0

    async def whole(self) -> Response:
        """The answer in one piece."""
        (output,) = await final_outputs(self._call.engine, self._call.job)
        delta = Progress().advance(output.outputs[0])
        num_logprobs = self._call.num_logprobs(output)
        if num_logprobs:  # In a thread, as they may be many.
            await self._call.engine.offload(lambda: self._take_whole(delta), is_long=True)
        else:
            self._take_whole(delta)
        response = await self._ended(delta, output)
        return await answer_with_logprobs(self._call.engine, lambda: response, num_logprobs, depth=LOGPROBS_DEPTH + 1)

    def _take_whole(self, delta: Delta) -> None:
        choice = self._call.form.new_choice()
        self._output = ResponseOutput(choice.new_call_id)
        self._feed(self._output, choice, delta)
        self._output.finish(_item_status(delta))

    async def events(self) -> AsyncGenerator[Chunks, None]:
        """The answer as it comes. What goes wrong after the first event is the last one."""
        try:
            async with aclosing(self._events()) as batches:
                async for batch in batches:
                    yield self._numbered(batch)
        except Exception as error:  # The status is sent: the stream itself must carry any error.
            problem = WORDS.renamed(error)
            if not self._num_events:
                raise problem from error
            events = [] if self._output is None else self._output.finish("incomplete")
            yield self._numbered([*events, {"type": "response.failed", "response": self._failed(problem)}])

    async def _events(self) -> AsyncGenerator[list[Event], None]:
        gained = Progress()
        last: tuple[Delta, RequestOutput] | None = None
        choice: ChatChoice | None = None
        wants_progress = self._request.include_progress
        async with aclosing(follow(self._call.engine, self._call.job, wants_progress=wants_progress)) as reports:
            async for _, report in reports:
                events = [] if self._num_events else self._beginning()
                if isinstance(report, RequestProgress):
                    yield [*events, {"type": PROGRESS_EVENT, "progress": progress_body(report)}]
                    continue
                if self._output is None or choice is None:
                    # Only now is the prompt known, and with it what answers look like.
                    choice = self._call.form.new_choice()
                    self._output = ResponseOutput(choice.new_call_id)
                for number, turn in enumerate(in_turns([(0, gained.advance(report.outputs[0]))])):
                    if number:
                        await asyncio.sleep(0)
                    for _, delta in turn:
                        events += self._feed(self._output, choice, delta)
                        last = (delta, report)
                    if events:
                        yield events
                    events = []
        assert last is not None
        assert self._output is not None
        events = self._output.finish(_item_status(last[0]))
        response = await self._ended(*last)
        yield [*events, {"type": f"response.{response['status']}", "response": response}]

    def _beginning(self) -> list[Event]:
        response = self._response("in_progress")
        return [{"type": f"response.{kind}", "response": response} for kind in ("created", "in_progress")]

    def _feed(self, output: ResponseOutput, choice: ChatChoice, delta: Delta) -> list[Event]:
        logprobs = self._call.logprobs(delta)
        return output.feed(choice.pieces(delta), logprobs["content"] if logprobs is not None else ())

    def _numbered(self, events: list[Event]) -> list[Event]:
        start = self._num_events
        self._num_events += len(events)
        return [{**event, "sequence_number": start + index} for index, event in enumerate(events)]

    # The response object

    async def _ended(self, delta: Delta, output: RequestOutput) -> dict[str, Any]:
        """The response at its end, however it ended."""
        usage = await self._usage(output)
        if delta.finish_reason == "abort":
            problem = ApiError(504, "the request took longer than --request-timeout and was stopped")
            return {**self._failed(problem), "usage": usage}
        if delta.finish_reason == "length":
            details = {"reason": "max_output_tokens"}
            return self._response("incomplete", incomplete_details=details, usage=usage)
        return self._response("completed", completed_at=int(time.time()), usage=usage)

    def _failed(self, problem: ApiError) -> dict[str, Any]:
        code = "rate_limit_exceeded" if problem.status == 429 else "server_error"
        return self._response("failed", error={"code": code, "message": str(problem)})

    async def _usage(self, output: RequestOutput) -> dict[str, Any]:
        counts = usage([output])
        thoughts = "" if self._output is None else self._output.thoughts
        num_thoughts = await self._call.engine.offload(lambda: self._count_tokens(thoughts)) if thoughts else 0
        return {
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": {**counts["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": min(num_thoughts, counts["completion_tokens"])},
            "total_tokens": counts["total_tokens"],
        }

    def _count_tokens(self, text: str) -> int:
        return len(self._call.engine.tokenizer.encode(text, add_special_tokens=False))

    def _response(self, status: str, **more: Any) -> dict[str, Any]:
        request, params = self._request, self._call.job.params
        return {
            "id": self._call.job.id,
            "object": "response",
            "created_at": self._call.job.created,
            "status": status,
            "background": False,
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "max_tool_calls": request.max_tool_calls,
            "metadata": request.metadata or {},
            "model": self._call.model,
            "output": [] if self._output is None else self._output.items,
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": request.reasoning.effort if request.reasoning else None, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": params.temperature,
            "text": {"format": self._text_format(), "verbosity": "medium"},
            "tool_choice": self._tool_choice(),
            "tools": [tool.model_dump(exclude={"defer_loading"}) for tool in request.tools or ()],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": None,
            **more,
        }

    def _text_format(self) -> dict[str, Any]:
        form = self._request.text.format if self._request.text is not None else None
        return {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)

    def _tool_choice(self) -> Any:
        choice = self._request.tool_choice
        if choice is None:
            return "auto"
        return choice if isinstance(choice, str) else choice.model_dump()


def _item_status(delta: Delta) -> str:
    """Of the last item: complete unless the answer was cut."""
    return "completed" if delta.finish_reason == "stop" else "incomplete"
