"""The official `openai` client and the bundled model: /v1/responses, tools in a real conversation, AsyncOpenAI, errors.

Plain chat and completions are in test_openai_client, forms and single calls in test_structured_client.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from tests.serving.chat_templates import HERMES
from tests.serving.openai_client import bundled_server, check_nothing_is_left, connected
from tests.serving.running import Running, serving
from tests.serving.scripted_engine import DIE_PROMPT, NAN_PROMPT, ScriptedEngine
from tests.waiting import wait_until

WAIT_SECONDS = 60.0
QUESTION = "What is the capital of France?"
WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "The weather of a city",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}
#: Of a model that does not think aloud, which would take its time.
TOOLS = HERMES.replace("think>", "quiet>")
FLAT: Any = {"type": "function", **WEATHER}


class Town(BaseModel):
    """What the model is to fill in."""

    size: int = Field(ge=0, le=9_999_999)
    climate: Literal["warm", "cold"]
    is_capital: bool


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with bundled_server(max_num_seqs=8, kv_cache_memory_bytes=128 * 2**20) as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with connected(server, WAIT_SECONDS) as opened:
        yield opened


def respond(client: openai.OpenAI, **more: Any) -> Any:
    return client.responses.create(**{"model": "smol", "input": QUESTION, "temperature": 0, **more})


# Responses


def test_a_response_says_what_chat_says(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model="smol", messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=40
    )
    response = respond(client, max_output_tokens=40)
    assert "Paris" in response.output_text
    assert response.output_text == chat.choices[0].message.content
    assert chat.usage is not None
    assert (response.status, response.model) == ("completed", "smol")
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.output_tokens == chat.usage.completion_tokens
    again = respond(client, input="x " * 100 + QUESTION, max_output_tokens=1)
    again = respond(client, input="x " * 100 + QUESTION, max_output_tokens=1)
    assert again.usage.input_tokens_details.cached_tokens > 0
    assert (again.status, again.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_a_streamed_response_is_the_whole_one(client: openai.OpenAI) -> None:
    whole = respond(client, max_output_tokens=40)
    with client.responses.stream(model="smol", input=QUESTION, temperature=0, max_output_tokens=40) as stream:
        seen = list(stream)
        final = stream.get_final_response()
    assert final.output_text == whole.output_text
    assert final.usage == whole.usage
    assert "".join(event.delta for event in seen if event.type == "response.output_text.delta") == whole.output_text
    deltas = [event for event in seen if event.type == "response.output_text.delta"]
    assert len(deltas) > 1
    assert deltas[-1].snapshot == whole.output_text
    assert [event.sequence_number for event in seen] == list(range(len(seen)))


def test_a_conversation_is_sent_back_item_by_item(client: openai.OpenAI) -> None:
    items: list[Any] = [{"role": "user", "content": "My name is Ada. Say hello."}]
    first = respond(client, input=items, max_output_tokens=16)
    items += first.output  # The client's own objects.
    items.append({"role": "user", "content": [{"type": "input_text", "text": "What is my name?"}]})
    second = respond(client, input=items, instructions="You know names.", max_output_tokens=16)
    chat = client.chat.completions.create(
        model="smol",
        messages=[
            {"role": "system", "content": "You know names."},
            {"role": "user", "content": "My name is Ada. Say hello."},
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": "What is my name?"},
        ],
        temperature=0,
        max_tokens=16,
    )
    assert second.output_text == chat.choices[0].message.content


def test_a_response_is_parsed_whole_and_streamed(client: openai.OpenAI) -> None:
    body: dict[str, Any] = {"model": "smol", "input": "Describe Rome.", "text_format": Town, "temperature": 0}
    whole = client.responses.parse(**body, max_output_tokens=80)
    assert isinstance(whole.output_parsed, Town)
    with client.responses.stream(**body, max_output_tokens=80) as stream:
        assert stream.get_final_response().output_parsed == whole.output_parsed


def test_log_probabilities_of_a_response_are_those_of_chat(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model="smol", messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=8,
        logprobs=True, top_logprobs=2,
    )  # fmt: skip
    entries = chat.choices[0].logprobs
    assert entries is not None
    more: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "max_output_tokens": 8}
    part = respond(client, **more).output[0].content[0]
    assert [entry.token for entry in part.logprobs] == [entry.token for entry in entries.content or ()]
    for mine, theirs in zip(part.logprobs, entries.content or (), strict=True):
        assert mine.logprob == pytest.approx(theirs.logprob, abs=0.05)  # The prefix cache rounds differently.
        assert len(mine.top_logprobs) == 2
    streamed = [entry for event in respond(client, stream=True, **more) for entry in getattr(event, "logprobs", ())
                if event.type == "response.output_text.delta"]  # fmt: skip
    assert [entry.token for entry in streamed] == [entry.token for entry in part.logprobs]


# Tools


def test_a_call_its_result_and_the_answer(client: openai.OpenAI, server: Running) -> None:
    server.engine.tokenizer = server.engine.tokenizer.with_chat_template(TOOLS)
    choice: Any = {"type": "function", "name": "get_weather"}
    items: list[Any] = [{"role": "user", "content": "How is the weather in Oslo?"}]
    more: dict[str, Any] = {"tools": [FLAT], "max_output_tokens": 50}
    first = respond(client, input=items, tool_choice=choice, parallel_tool_calls=False, **more)
    (call,) = first.output
    assert (call.type, call.name, call.status) == ("function_call", "get_weather", "completed")
    jsonschema.validate(json.loads(call.arguments), WEATHER["parameters"])
    arguments, named = "", ""
    for event in respond(client, input=items, tool_choice=choice, parallel_tool_calls=False, stream=True, **more):
        if event.type == "response.function_call_arguments.delta":
            arguments += event.delta
        elif event.type == "response.function_call_arguments.done":
            named = event.name
            assert event.arguments == arguments
    assert (arguments, named) == (call.arguments, "get_weather")
    items += [call, {"type": "function_call_output", "call_id": call.call_id, "output": "It rains."}]
    last = respond(client, input=items, tool_choice="none", **more)
    assert [item.type for item in last.output] == ["message"]
    assert last.usage.input_tokens > first.usage.input_tokens


def test_parallel_calls_whole_and_streamed(client: openai.OpenAI, server: Running) -> None:
    server.engine.tokenizer = server.engine.tokenizer.with_chat_template(TOOLS)
    body: Any = {
        "model": "smol",
        "messages": [{"role": "user", "content": "The weather in Rome and in Oslo?"}],
        "tools": [{"type": "function", "function": WEATHER}],
        "tool_choice": "required",
        "temperature": 1.0,
        "max_tokens": 70,
        # Encourages another call after the first.
        "logit_bias": {str(token_id): -100 for token_id in server.engine.tokenizer.eos_token_ids},
    }
    whole = client.chat.completions.create(**body, seed=3).choices[0].message.tool_calls or []
    assert len(whole) > 1
    assert len({call.id for call in whole}) == len(whole)
    for call in whole[:-1]:  # The last one may have been cut.
        assert call.type == "function"
        jsonschema.validate(json.loads(call.function.arguments), WEATHER["parameters"])
    parts: dict[int, str] = {}
    names: list[str] = []
    for chunk in client.chat.completions.create(**body, seed=3, stream=True):
        for part in chunk.choices[0].delta.tool_calls or ():
            names += [part.function.name] if part.function.name else []
            parts[part.index] = parts.get(part.index, "") + (part.function.arguments or "")
    assert [*parts.values()] == [call.function.arguments for call in whole if call.type == "function"]
    assert names == ["get_weather"] * len(parts)
    flat = {"input": body["messages"], "tools": [FLAT], "logit_bias": body["logit_bias"], "seed": 3}
    response = client.responses.create(
        model="smol", input=body["messages"], tools=[FLAT], tool_choice="required", temperature=1.0,
        max_output_tokens=70, extra_body={name: flat[name] for name in ("logit_bias", "seed")},
    )  # fmt: skip
    calls = [item.arguments for item in response.output if item.type == "function_call"]
    assert calls == [call.function.arguments for call in whole if call.type == "function"]


def test_tools_of_pydantic_are_parsed(client: openai.OpenAI, server: Running) -> None:
    server.engine.tokenizer = server.engine.tokenizer.with_chat_template(TOOLS)
    response = client.responses.parse(
        model="smol", input="Describe Rome.", tools=[openai.pydantic_function_tool(Town)["function"] | {"type": "function"}],  # type: ignore[list-item]  # noqa: E501
        tool_choice="required", parallel_tool_calls=False, temperature=0, max_output_tokens=100,
    )  # fmt: skip
    (call,) = (item for item in response.output if item.type == "function_call")
    assert Town.model_validate(call.parsed_arguments)


# AsyncOpenAI


def test_many_at_once_and_one_that_is_cancelled(server: Running) -> None:
    async def scenario() -> None:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=WAIT_SECONDS
        ) as client:
            body: Any = {"model": "smol", "input": QUESTION, "temperature": 0, "max_output_tokens": 24}
            long: Any = {**body, "max_output_tokens": 900, "extra_body": {"ignore_eos": True}}

            async def streamed() -> str:
                async with client.responses.stream(**body) as stream:
                    return (await stream.get_final_response()).output_text

            # One that is left in the middle of its stream, one that is cancelled while it waits for the whole.
            left = await client.responses.create(**long, stream=True)
            waiting = asyncio.ensure_future(client.responses.create(**long))
            async for event in left:
                if event.type == "response.output_text.delta":
                    break
            texts = asyncio.gather(*[streamed() for _ in range(4)])
            await asyncio.sleep(0.1)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await left.close()
            whole = await client.responses.create(**body)
            assert await texts == [whole.output_text] * 4

    asyncio.run(scenario())
    check_nothing_is_left(server)


# Errors


@pytest.fixture(scope="module")
def scripted() -> Iterator[Running]:
    with serving(ScriptedEngine(), served_model_names=("smol",)) as running:
        yield running


def scripted_client(server: Running, **more: Any) -> openai.OpenAI:
    options = {"api_key": "none", "max_retries": 0, "timeout": WAIT_SECONDS, **more}
    return openai.OpenAI(base_url=f"{server.url}/v1", **options)


@pytest.mark.parametrize(
    ("body", "kind", "code"),
    [
        ({"temperature": 3}, openai.BadRequestError, None),
        ({"previous_response_id": "resp_1"}, openai.BadRequestError, "unsupported_parameter"),
        ({"input": "word " * 500}, openai.BadRequestError, "context_length_exceeded"),
        ({"model": "other"}, openai.NotFoundError, "model_not_found"),
        ({"input": NAN_PROMPT}, openai.InternalServerError, "generation_failed"),
        ({"extra_headers": {"Origin": "https://evil.example"}}, openai.PermissionDeniedError, "forbidden"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_errors_have_their_classes(
    scripted: Running, body: dict[str, Any], kind: type[openai.APIStatusError], code: str
) -> None:
    with scripted_client(scripted) as client:
        for stream in (False, True):
            with pytest.raises(kind) as caught:
                respond(client, stream=stream, **body)
            assert caught.value.code == code
            assert caught.value.message


def test_nobody_without_a_key() -> None:
    with serving(ScriptedEngine(), served_model_names=("smol",), api_keys=("a-test-key",)) as server:
        with scripted_client(server) as client, pytest.raises(openai.AuthenticationError):
            respond(client)
        with scripted_client(server, api_key="a-test-key") as client:
            assert respond(client, max_output_tokens=2).output_text


def num_refused(server: Running) -> int:
    found = re.search(r'rejections_total\{.*reason="queue_full".*\} (\d+)', server.get("/metrics").text)
    return 0 if found is None else int(found[1])


def test_a_full_server_is_a_rate_limit_and_the_client_tries_again() -> None:
    engine = ScriptedEngine(max_num_seqs=1)
    with serving(engine, served_model_names=("smol",), max_queue=0) as server, ThreadPoolExecutor(2) as pool:
        engine.hold()
        with scripted_client(server) as client, scripted_client(server, max_retries=5) as patient:
            first = pool.submit(respond, client, max_output_tokens=4)
            wait_until(lambda: engine.has_unfinished)
            with pytest.raises(openai.RateLimitError) as caught:
                respond(client)
            assert caught.value.code == "queue_full"
            assert int(caught.value.response.headers["retry-after"]) >= 1
            second = pool.submit(respond, patient, max_output_tokens=4)
            wait_until(lambda: num_refused(server) >= 2)
            engine.allow()
            assert first.result().output_text == second.result().output_text


def test_an_error_in_the_middle_of_a_stream() -> None:
    engine = ScriptedEngine(max_model_len=32_768)
    body: Any = {"model": "smol", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    killing = {"model": "smol", "prompt": DIE_PROMPT}
    with (
        serving(engine, served_model_names=("smol",)) as server,
        scripted_client(server) as client,
        ThreadPoolExecutor(2) as pool,
    ):
        engine.hold()
        engine.allow(3)
        stream = respond(client, stream=True)
        kinds = [next(stream).type for _ in range(3)]
        assert kinds[:2] == ["response.created", "response.in_progress"]
        opening = pool.submit(client.chat.completions.create, **body)
        wait_until(lambda: engine.allow(1) is None and opening.done())
        waiting = pool.submit(list, opening.result())
        killer = pool.submit(httpx.post, f"{server.url}/v1/completions", json=killing, timeout=WAIT_SECONDS)
        wait_until(lambda: engine.allow(1) is None and killer.done())
        with pytest.raises(openai.APIError, match="engine"):
            waiting.result()
        last = list(stream)[-1]
        assert last.type == "response.failed"
        assert last.response.status == "failed"
        assert last.response.error.code == "server_error"
        with pytest.raises(openai.InternalServerError) as caught:
            respond(client)
        assert caught.value.status_code == 503


def test_a_server_that_is_not_there() -> None:
    with serving(ScriptedEngine()) as server:
        client = scripted_client(server, timeout=5)
    with client, pytest.raises(openai.APIConnectionError):
        respond(client)
