"""POST /v1/chat/completions.

Invariant: the deltas of a stream, joined, are the text of the same request without streaming. What a message may hold
is protocol's business, how it becomes a prompt the tokenizer's.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from qengine.request import RequestOutput
from qengine.serving.async_engine import AsyncEngine
from qengine.serving.body import read_json_object
from qengine.serving.chat_form import ChatChoice, ChatForm, template_message
from qengine.serving.errors import json_response
from qengine.serving.generation import (
    Delta,
    Job,
    Progress,
    answer,
    cache_salt,
    check_num_logprobs,
    check_prompt_chars,
    final_outputs,
    new_id,
    sampling_params,
    trace_parent,
    usage,
)
from qengine.serving.limits import LIMITS
from qengine.serving.logprobs import chat_logprobs
from qengine.serving.protocol import ChatCompletionRequest, Prompt, parse_request
from qengine.serving.service import Service, service_of
from qengine.serving.streaming import Chunks, event_stream, while_connected

router = APIRouter()


@router.post("/v1/chat/completions")
async def create_chat_completion(http: Request) -> Response:
    """Answer a conversation."""
    service = service_of(http)
    service.ready_engine()
    request = parse_request(ChatCompletionRequest, await read_json_object(http))
    service.check_model(request.model)
    # Again: reading the body may have taken long enough for the server's state to change.
    call = _ChatCall(service, service.ready_engine(), request, cache_salt(http, request), trace_parent(http))
    if request.stream:
        return await event_stream(http, call.chunks())
    return json_response(await while_connected(http, call.whole()))


class _ChatCall:
    """One call and the shape of its answer."""

    def __init__(
        self, service: Service, engine: AsyncEngine, request: ChatCompletionRequest, salt: str, traceparent: str | None
    ) -> None:
        check_num_logprobs(request.top_logprobs, "top_logprobs", service.max_logprobs)
        num_chars = sum(message.num_chars for message in request.messages)
        check_prompt_chars(num_chars, engine.info.max_model_len, "messages")
        self._engine = engine
        self._request = request
        self._form = ChatForm(request, engine.tokenizer)
        self._model = service.model_names[0]
        self._num_top = request.top_logprobs or 0
        self._job = Job(
            prompts=self._render,
            num_prompts=1,
            prompt_param="messages",
            params=sampling_params(
                request,
                engine.info.default_sampling,
                max_tokens=request.token_limit,
                logprobs=self._num_top if request.logprobs else None,
                **self._form.sampling,
            ),
            token_limit=request.token_limit,
            add_special_tokens=bool(request.add_special_tokens),
            cache_salt=salt,
            traceparent=traceparent,
            id=new_id("chatcmpl"),
            form=lambda prompts: self._form.at(prompts[0]),
        )

    def _render(self) -> list[Prompt]:
        """The prompt's text. Runs in a thread."""
        tokenizer = self._engine.tokenizer
        messages = [template_message(message, index) for index, message in enumerate(self._request.messages)]
        if "developer" not in (tokenizer.chat_template or ""):
            for message in messages:
                if message["role"] == "developer":  # OpenAI's newer name; this model was trained on the older one.
                    message["role"] = "system"
        continues = bool(self._request.continue_final_message)
        adds_prompt = self._request.add_generation_prompt
        text = tokenizer.render_chat(
            messages,
            add_generation_prompt=not continues if adds_prompt is None else adds_prompt,
            continue_final_message=continues,
            tools=self._form.template_tools,
            max_chars=self._engine.info.max_model_len * LIMITS.prompt_chars_per_token,
            template_options=self._request.chat_template_kwargs,
        )
        return [text]

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        outputs = await final_outputs(self._engine, self._job)
        choices = [self._whole_choice(choice.index, Progress().advance(choice)) for choice in outputs[0].outputs]
        return {**self._head("chat.completion"), "choices": choices, "usage": usage(outputs)}

    def _whole_choice(self, index: int, delta: Delta) -> dict[str, Any]:
        choice = self._form.new_choice()
        return {
            "index": index,
            "message": choice.message(delta),
            "logprobs": self._logprobs(delta),
            "finish_reason": choice.finish_reason(delta.finish_reason),
            "stop_reason": delta.stop_reason,
        }

    async def chunks(self) -> AsyncGenerator[Chunks, None]:
        """The answer as it comes: roles, pieces of text, ends, and the token counts if wanted."""
        progress = [Progress() for _ in range(self._job.params.n)]
        parts: list[ChatChoice] = []
        last: RequestOutput | None = None
        async with aclosing(answer(self._engine, self._job)) as outputs:
            async for _, output in outputs:
                role = {"role": "assistant", "content": ""}
                chunks = [] if last else [self._chunk(index, role) for index in range(len(progress))]
                # Only now is the prompt known, and with it what answers look like.
                parts = parts or [self._form.new_choice() for _ in progress]
                for choice in output.outputs:
                    delta = progress[choice.index].advance(choice)
                    chunks += self._choice_chunks(choice.index, parts[choice.index], delta)
                last = output
                if chunks:
                    yield chunks
        if last is not None and self._request.include_usage:
            yield [{**self._head("chat.completion.chunk"), "choices": [], "usage": usage([last])}]

    def _choice_chunks(self, index: int, choice: ChatChoice, delta: Delta) -> list[dict[str, Any]]:
        """New text, then the end: together in one chunk they confuse clients."""
        parts = choice.deltas(delta)
        if not parts and delta.logprobs is not None and delta.token_ids:
            parts = [{"content": ""}]
        chunks = [self._chunk(index, part) for part in parts]
        if chunks:
            chunks[0]["choices"][0]["logprobs"] = self._logprobs(delta)
        if delta.finish_reason is not None:
            end = {"finish_reason": choice.finish_reason(delta.finish_reason), "stop_reason": delta.stop_reason}
            chunks.append(self._chunk(index, {}, **end))
        return chunks

    def _chunk(self, index: int, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        chunk = {**self._head("chat.completion.chunk"), "choices": [choice]}
        return {**chunk, "usage": None} if self._request.include_usage else chunk

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if delta.logprobs is None:
            return None
        return chat_logprobs(self._engine.tokenizer, delta.token_ids, delta.logprobs, self._num_top)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._job.id, "object": kind, "created": self._job.created, "model": self._model}
