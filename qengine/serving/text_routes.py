"""POST /tokenize and /detokenize: text and token ids into each other, as vLLM does it.

Invariant: the event loop never waits for a long text. It is tokenized in a thread of its own kind, by a library call
that lets other threads run, and its answer is written piece by piece for the same reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from qengine.serving.api_answers import Detokenized, Tokenized
from qengine.serving.api_schema import described
from qengine.serving.async_engine import AsyncEngine
from qengine.serving.chat_call import ChatCall
from qengine.serving.errors import invalid, json_response
from qengine.serving.generation import new_id
from qengine.serving.large_json import large_json, large_response
from qengine.serving.limits import LIMITS
from qengine.serving.protocol import (
    ChatCompletionRequest,
    ChatMessage,
    CheckedRequest,
    Effort,
    ListOf,
    Tool,
)
from qengine.serving.reading import read_request
from qengine.serving.service import Service, service_of
from qengine.serving.streaming import while_connected
from qengine.tokenizer import Tokenizer

router = APIRouter()
_ModelName = Annotated[str, Field(min_length=1, max_length=LIMITS.model_name_chars)]


class TokenizeRequest(CheckedRequest):
    """POST /tokenize: a text, or a conversation as chat would render it."""

    model: _ModelName | None = None
    prompt: str | None = None
    messages: Annotated[ListOf[ChatMessage], Field(min_length=1, max_length=LIMITS.num_messages)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Effort | None = None
    tools: Annotated[ListOf[Tool], Field(max_length=LIMITS.num_tools)] | None = None

    def check_together(self) -> None:
        super().check_together()
        if (self.prompt is None) == (self.messages is None):
            found = "both given" if self.prompt is not None else "both missing"
            raise invalid(f"prompt and messages are {found}, expected one of them", param="prompt")
        if self.prompt is None:
            return
        of_messages = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "reasoning_effort")
        for name in (*of_messages, "tools"):
            if getattr(self, name):
                raise invalid(f"{name} is given, but it belongs to messages and not to a prompt", param=name)


class DetokenizeRequest(CheckedRequest):
    """POST /detokenize."""

    model: _ModelName | None = None
    tokens: ListOf[int]


@router.post("/tokenize", **described(tag="Text", body=TokenizeRequest, answer=Tokenized))
async def tokenize(http: Request) -> Response:
    """The token ids of a text, or of a conversation's prompt.

    A text may be as long as a body may be, longer than the context.
    """
    service = service_of(http)
    service.ready_engine()
    request = await read_request(http, TokenizeRequest)
    engine = _engine(service, request.model)
    if request.prompt is not None:
        text = request.prompt
        adds_special = request.add_special_tokens is not False
    else:
        call = ChatCall(http, _chat_request(request, service), id=new_id("tokenize"))
        (text,) = await while_connected(
            http, engine.offload_text(lambda: [str(prompt) for prompt in call.job.prompts()])
        )
        adds_special = bool(request.add_special_tokens)

    def work() -> list[bytes]:
        ids = engine.tokenizer.encode(text, add_special_tokens=adds_special)
        return _answer(engine.tokenizer, ids, engine.info.max_model_len, bool(request.return_token_strs))

    is_long = len(text) > LIMITS.long_text_chars
    return large_response(await while_connected(http, engine.offload_text(work, is_long=is_long)))


@router.post("/detokenize", **described(tag="Text", body=DetokenizeRequest, answer=Detokenized))
async def detokenize(http: Request) -> Response:
    """The text of token ids, special tokens and all."""
    service = service_of(http)
    service.ready_engine()
    request = await read_request(http, DetokenizeRequest)
    engine = _engine(service, request.model)
    is_long = len(request.tokens) > LIMITS.long_text_chars

    def work() -> str:
        _check_ids(request.tokens, engine.info.vocab_size)
        return engine.tokenizer.decode(request.tokens, skip_special_tokens=False)

    return json_response({"prompt": await while_connected(http, engine.offload_text(work, is_long=is_long))})


def _engine(service: Service, model: str | None) -> AsyncEngine:
    if model is not None:
        service.check_model(model)
    return service.ready_engine()


def _chat_request(request: TokenizeRequest, service: Service) -> ChatCompletionRequest:
    chat = ChatCompletionRequest(
        model=request.model or service.model_names[0],
        messages=request.messages or [],
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        chat_template_kwargs=request.chat_template_kwargs,
        reasoning_effort=request.reasoning_effort,
        tools=request.tools,
    )
    chat.check_together()
    return chat


def _check_ids(tokens: Sequence[int], vocab_size: int) -> None:
    for index, token_id in enumerate(tokens):
        if not 0 <= token_id < vocab_size:
            where = f"tokens[{index}]"
            raise invalid(f"{where} is {token_id}, expected token ids from 0 to {vocab_size - 1}", param=where)


def _answer(tokenizer: Tokenizer, ids: list[int], max_model_len: int, wants_strings: bool) -> list[bytes]:
    spelled = [tokenizer.token_spelling(token_id) for token_id in ids] if wants_strings else None
    return large_json({"count": len(ids), "max_model_len": max_model_len, "tokens": ids, "token_strs": spelled})
