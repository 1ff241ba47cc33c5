"""POST /v1/embeddings: vectors of texts, made of the served model's hidden states.

Invariant: texts are computed in the same batches as everything else, and a text's vector depends on the text alone. The
vectors are those of a model that was trained to write; how they are pooled is the client's choice.
"""

from __future__ import annotations

import base64
import time
from array import array
from collections.abc import Sequence
from contextlib import aclosing
from functools import cached_property
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field, WithJsonSchema
from starlette.responses import Response

from qengine.engine import PendingRequest
from qengine.errors import RequestError
from qengine.request import Pooling, RequestOutput
from qengine.serving.api_answers import EmbeddingList
from qengine.serving.api_schema import described
from qengine.serving.async_engine import AsyncEngine
from qengine.serving.errors import ApiError, invalid
from qengine.serving.generation import cache_salt, check_prompt_chars, new_id
from qengine.serving.large_json import large_json, large_response
from qengine.serving.limits import LIMITS
from qengine.serving.protocol import PROMPT_SCHEMA, CacheSalt, CheckedRequest, Prompt, checked_prompts
from qengine.serving.reading import read_request
from qengine.serving.service import service_of
from qengine.serving.streaming import while_connected

router = APIRouter()


class EmbeddingRequest(CheckedRequest):
    """POST /v1/embeddings. `input` is a string, token ids, or a list of either; `prompts` is always a list."""

    model: Annotated[str, Field(min_length=1, max_length=LIMITS.model_name_chars)]
    input: Annotated[Any, WithJsonSchema(PROMPT_SCHEMA)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=LIMITS.max_tokens)] | None = None
    pooling: Pooling | None = None
    normalize: bool | None = None
    add_special_tokens: bool | None = None
    cache_salt: CacheSalt | None = None

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The texts, checked. Raises ApiError."""
        return checked_prompts(self.input, "input", self._rules.num_prompts)

    def check_together(self) -> None:
        super().check_together()
        _ = self.prompts


@router.post("/v1/embeddings", **described(tag="Text", body=EmbeddingRequest, answer=EmbeddingList))
async def create_embeddings(http: Request) -> Response:
    """A vector for each text: the model's hidden states after its last layer, pooled."""
    service = service_of(http)
    service.ready_engine()
    request = await read_request(http, EmbeddingRequest)
    service.check_model(request.model)
    engine = service.ready_engine()
    _check_dimensions(request.dimensions, engine.info.hidden_size)
    outputs = await while_connected(http, _embed(engine, request, cache_salt(http, request.cache_salt)))
    # In a thread: a hundred long vectors are many megabytes of digits.
    as_base64 = request.encoding_format == "base64"
    return large_response(await engine.offload(lambda: _answer(outputs, service.model_names[0], as_base64)))


def _check_dimensions(found: int | None, hidden_size: int) -> None:
    if found not in (None, hidden_size):
        raise invalid(
            f"dimensions is {found}, but this model's vectors have {hidden_size} numbers and mean nothing when cut: "
            "it was not trained for that; leave it out",
            param="dimensions",
            code="unsupported_parameter",
        )


async def _embed(engine: AsyncEngine, request: EmbeddingRequest, salt: str) -> list[RequestOutput]:
    """The outputs in the order of the texts."""
    call_id, arrival_time = new_id("embd"), time.monotonic()
    found: dict[str, RequestOutput] = {}
    with engine.admission.reserve(len(request.prompts)):
        preparing = engine.offload(lambda: _prepare(engine, request, call_id, arrival_time, salt))
        pending = await engine.in_time(preparing, arrival_time)
        async with aclosing(engine.run(pending, arrival_time=arrival_time)) as outputs:
            async for output in outputs:
                if output.error is not None:
                    raise ApiError(500, f"the request failed: {output.error}", code="generation_failed")
                found[output.request_id] = output
    return [found[one.request_id] for one in pending]


def _prepare(
    engine: AsyncEngine, request: EmbeddingRequest, call_id: str, arrival_time: float, salt: str
) -> list[PendingRequest]:
    """Tokenize and check every text. Runs in a thread."""
    pending = []
    for index, prompt in enumerate(request.prompts):
        if isinstance(prompt, str):
            check_prompt_chars(len(prompt), engine.info.max_model_len, "input")
        try:
            one = engine.make_embedding_request(
                f"{call_id}-{index}",
                prompt,
                pooling=request.pooling or "last",
                normalize=request.normalize is not False,
                cache_salt=salt,
                add_special_tokens=request.add_special_tokens is not False,
                arrival_time=arrival_time,
            )
        except RequestError as error:
            param = "input" if error.param == "prompt" else error.param
            raise RequestError(str(error), param=param, code=error.code) from error
        pending.append(one)
    return pending


def _answer(outputs: Sequence[RequestOutput], model: str, as_base64: bool) -> list[bytes]:
    items = []
    for index, output in enumerate(outputs):
        vector = output.embedding or []
        shown: Any = base64.b64encode(array("f", vector).tobytes()).decode() if as_base64 else vector
        items.append({"object": "embedding", "index": index, "embedding": shown})
    num_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return large_json({"object": "list", "data": items, "model": model, "usage": usage}, depth=2)
