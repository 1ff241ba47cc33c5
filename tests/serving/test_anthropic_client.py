"""The official `anthropic` client and the bundled model: messages, streams, tools, stop sequences, counting, errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import jsonschema
import pytest

from qengine.config import EngineConfig
from qengine.engine import Engine
from tests.serving.chat_templates import HERMES
from tests.serving.running import Running, serving
from tests.serving.scripted_engine import DIE_PROMPT, ScriptedEngine

KEY = "a-test-key"
WAIT_SECONDS = 120.0
QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER: Any = {"name": "get_weather", "description": "The weather of a city", "input_schema": SCHEMA, "strict": True}
COUNTING: Any = [{"role": "user", "content": "Count from 1 to 9, with a comma after each number."}]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    options = {"max_model_len": 1024, "max_num_seqs": 8, "kv_cache_memory_bytes": 128 * 2**20}
    engine = Engine.start(EngineConfig.from_options(options))
    with serving(engine, api_keys=(KEY,), served_model_names=("smol",), max_queue=32) as running:
        yield running


def open_client(server: Running, key: str = KEY) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0, timeout=WAIT_SECONDS)


@pytest.fixture
def client(server: Running) -> Iterator[anthropic.Anthropic]:
    """A client; afterwards nothing may be left in the engine."""
    tokenizer = server.engine.tokenizer
    with open_client(server) as opened:
        yield opened
    server.engine.tokenizer = tokenizer
    server.wait_until_quiet()
    assert server.engine.num_free_blocks == server.engine.info.num_blocks
    server.engine.check_integrity()


@pytest.fixture
def knows_tools(server: Running, client: anthropic.Anthropic) -> None:
    """The bundled model's own template knows no tools."""
    server.engine.tokenizer = server.engine.tokenizer.with_chat_template(HERMES)


def ask(client: anthropic.Anthropic, **more: Any) -> Any:
    """Greedy. The client has no parameter for the temperature, which servers still take."""
    body = {"model": "smol", "messages": QUESTION, "max_tokens": 40, "extra_body": {"temperature": 0}, **more}
    return client.messages.create(**body)


def texts(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_a_message_says_what_chat_says(server: Running, client: anthropic.Anthropic) -> None:
    message = ask(client)
    body = {"model": "smol", "messages": QUESTION, "max_tokens": 40, "temperature": 0}
    chat = server.post("/v1/chat/completions", body, headers={"x-api-key": KEY}).json()
    assert "Paris" in texts(message)
    assert [block.text for block in message.content] == [chat["choices"][0]["message"]["content"]]
    assert (message.type, message.role, message.model, message.stop_reason) == (
        "message",
        "assistant",
        "smol",
        "end_turn",
    )
    assert message.id.startswith("msg_")
    usage = message.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == chat["usage"]["prompt_tokens"]
    assert usage.output_tokens == chat["usage"]["completion_tokens"]


def test_a_repeated_beginning_is_counted_as_cached(client: anthropic.Anthropic) -> None:
    system: Any = [{"type": "text", "text": "Be brief. " * 40, "cache_control": {"type": "ephemeral"}}]
    first, second = (ask(client, system=system, max_tokens=5) for _ in range(2))
    assert second.usage.cache_read_input_tokens > 64
    total = second.usage.input_tokens + second.usage.cache_read_input_tokens
    assert total == first.usage.input_tokens + first.usage.cache_read_input_tokens
    assert first.content == second.content


def test_the_streaming_helper_holds_the_whole_message(client: anthropic.Anthropic) -> None:
    whole = ask(client)
    with client.messages.stream(
        model="smol", messages=QUESTION, max_tokens=40, extra_body={"temperature": 0}
    ) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert len(pieces) > 1
    assert "".join(pieces) == texts(whole) == texts(final)
    assert (final.stop_reason, final.stop_sequence) == (whole.stop_reason, None)
    assert final.usage.output_tokens == whole.usage.output_tokens
    total = whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
    assert final.usage.input_tokens + (final.usage.cache_read_input_tokens or 0) == total


def test_raw_events_come_in_anthropics_order(client: anthropic.Anthropic) -> None:
    kinds = [event.type for event in ask(client, stream=True)]
    assert kinds[:3] == ["message_start", "content_block_start", "content_block_delta"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert {*kinds[3:-3]} == {"content_block_delta"}


def test_a_stop_sequence_ends_it_and_is_named(client: anthropic.Anthropic) -> None:
    plain = texts(ask(client, messages=COUNTING))
    word = plain.split()[2]
    for stream in (False, True):
        body: dict[str, Any] = {"messages": COUNTING, "stop_sequences": ["no such thing", word]}
        if stream:
            sampling = {"temperature": 0}
            with client.messages.stream(model="smol", max_tokens=40, extra_body=sampling, **body) as events:
                message: Any = events.get_final_message()
        else:
            message = ask(client, **body)
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", word)
        assert texts(message) == plain[: plain.index(word)]


def test_max_tokens_and_the_context_end_it_by_their_names(client: anthropic.Anthropic) -> None:
    cut = ask(client, messages=COUNTING, max_tokens=3)
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 3)
    long = ask(client, messages=[{"role": "user", "content": "a b " * 470}], max_tokens=32_000)
    prompt = long.usage.input_tokens + long.usage.cache_read_input_tokens
    assert long.stop_reason in ("model_context_window_exceeded", "end_turn")
    if long.stop_reason != "end_turn":
        assert prompt + long.usage.output_tokens == 1024
    with pytest.raises(anthropic.BadRequestError, match="the context holds 1024"):
        ask(client, messages=[{"role": "user", "content": "a b " * 1000}])


def test_an_answer_goes_on_from_its_beginning(client: anthropic.Anthropic) -> None:
    begun = [*QUESTION, {"role": "assistant", "content": "The capital of France is the city of"}]
    assert texts(ask(client, messages=begun, max_tokens=8)).startswith(" Paris")


def test_turns_and_blocks_are_what_chat_reads(client: anthropic.Anthropic) -> None:
    blocks = [
        {"role": "user", "content": [{"type": "text", "text": "My name is Ada."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Hello Ada."}]},
        {"role": "user", "content": "What is"},
        {"role": "user", "content": [{"type": "text", "text": "my name?"}]},
    ]
    plain = [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": "Hello Ada."},
        {"role": "user", "content": "What is\nmy name?"},
    ]
    system = "You know names."
    counted = [
        client.messages.count_tokens(model="smol", messages=messages, system=said).input_tokens  # type: ignore[arg-type]
        for messages, said in ((blocks, [{"type": "text", "text": system}]), (plain, system))
    ]
    assert counted[0] == counted[1]
    assert texts(ask(client, messages=blocks, system=system)) == texts(ask(client, messages=plain, system=system))


def test_counting_gives_the_prompt_tokens_of_the_message(client: anthropic.Anthropic) -> None:
    counted = client.messages.count_tokens(model="smol", messages=QUESTION, system="Be brief.")
    usage = ask(client, system="Be brief.", max_tokens=1).usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


# Tools


def test_a_tool_is_called_and_its_result_read(client: anthropic.Anthropic, knows_tools: None) -> None:
    ask_weather: Any = [{"role": "user", "content": "What will the weather be in Oslo for 3 days?"}]
    choice = {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True}
    # The template lets a model think before a call, which this one does not know how to end.
    off: Any = {"thinking": {"type": "disabled"}}
    message = ask(client, messages=ask_weather, tools=[WEATHER], tool_choice=choice, max_tokens=80, **off)
    assert message.stop_reason == "tool_use"
    (call,) = message.content
    assert (call.type, call.name) == ("tool_use", "get_weather")
    jsonschema.validate(call.input, SCHEMA)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "Snow."}]}
    messages: Any = [*ask_weather, message.to_param(), {"role": "user", "content": [result]}]
    answer = ask(client, messages=messages, tools=[WEATHER], tool_choice={"type": "none"}, max_tokens=20)
    assert answer.stop_reason in ("end_turn", "max_tokens")
    more = client.messages.count_tokens(model="smol", messages=messages, tools=[WEATHER])
    assert more.input_tokens == answer.usage.input_tokens + answer.usage.cache_read_input_tokens
    failed = [*messages[:-1], {"role": "user", "content": [{**result, "is_error": True}]}]
    less = client.messages.count_tokens(model="smol", messages=failed, tools=[WEATHER])
    assert less.input_tokens > more.input_tokens


def test_arguments_stream_as_json(client: anthropic.Anthropic, knows_tools: None) -> None:
    body: dict[str, Any] = {
        "model": "smol",
        "messages": QUESTION,
        "tools": [WEATHER],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        "max_tokens": 80,
        "thinking": {"type": "disabled"},
        "extra_body": {"temperature": 0},
    }
    whole = client.messages.create(**body)
    with client.messages.stream(**body) as stream:
        seen: list[Any] = list(stream)
        final = stream.get_final_message()
    calls: list[Any] = [block for block in final.content if block.type == "tool_use"]
    assert [(c.name, c.input) for c in calls] == [(c.name, c.input) for c in whole.content if c.type == "tool_use"]
    assert len(calls) == 1
    pieces = [event.partial_json for event in seen if event.type == "input_json"]
    assert json.loads("".join(pieces)) == calls[0].input
    assert final.stop_reason == "tool_use"


def test_output_of_a_schema(client: anthropic.Anthropic) -> None:
    form: Any = {"format": {"type": "json_schema", "schema": SCHEMA}}
    jsonschema.validate(json.loads(texts(ask(client, output_config=form, max_tokens=80))), SCHEMA)


# Errors


def test_errors_have_the_clients_classes(server: Running, client: anthropic.Anthropic) -> None:
    with open_client(server, "wrong-key") as stranger, pytest.raises(anthropic.AuthenticationError) as caught:
        ask(stranger)
    body: Any = caught.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "authentication_error")
    assert {*body["error"]} == {"type", "message"}
    with pytest.raises(anthropic.NotFoundError, match="'other' does not exist"):
        ask(client, model="other")
    with pytest.raises(anthropic.BadRequestError, match="invalid_request_error"):
        ask(client, max_tokens=0)
    image: Any = {"type": "image", "source": {"type": "url", "url": "http://169.254.169.254/"}}
    with pytest.raises(anthropic.BadRequestError, match="reads no images"):
        ask(client, messages=[{"role": "user", "content": [image]}])
    # The server answers and closes without reading on, which a client in the middle of sending may not see.
    with pytest.raises((anthropic.RequestTooLargeError, anthropic.APIConnectionError)):
        ask(client, messages=[{"role": "user", "content": "a" * (8 * 2**20)}])
    with pytest.raises(anthropic.BadRequestError, match="does not think"):
        ask(client, thinking={"type": "enabled", "budget_tokens": 1024}, max_tokens=2048)
    assert texts(ask(client, thinking={"type": "disabled"})) == texts(ask(client))


def test_a_full_server_an_engine_that_dies_and_one_that_loads() -> None:
    engine = ScriptedEngine(max_num_seqs=1)
    engine.hold()
    with serving(engine, max_queue=0) as running, open_client(running) as client:
        stream = client.messages.stream(model="scripted", messages=[{"role": "user", "content": "a"}], max_tokens=200)
        with httpx.Client(base_url=running.url, timeout=WAIT_SECONDS) as plain:
            engine.allow(1)
            with stream as events:
                next(iter(events))
                with pytest.raises(anthropic.RateLimitError) as caught:
                    ask(client, model="scripted")
                assert caught.value.response.headers["retry-after"] == "1"
                assert caught.value.body["error"]["type"] == "rate_limit_error"  # type: ignore[index]
                engine.allow()
                list(events)
            with pytest.raises(anthropic.InternalServerError):
                ask(client, model="scripted", messages=[{"role": "user", "content": DIE_PROMPT}])
            assert plain.post("/v1/messages", json={}).json()["type"] == "error"
    with serving(None) as loading, open_client(loading) as client:
        with pytest.raises(anthropic.APIStatusError) as refused:
            ask(client)
        assert refused.value.status_code == 503
        assert refused.value.body["error"]["type"] == "overloaded_error"  # type: ignore[index]


def test_an_error_in_a_stream_is_raised() -> None:
    engine = ScriptedEngine()
    engine.hold()
    with serving(engine) as running, open_client(running) as client:
        engine.allow(2)
        body: Any = {"model": "scripted", "messages": [{"role": "user", "content": "a"}], "max_tokens": 200}
        with client.messages.stream(**body) as events:
            pieces = events.text_stream
            next(pieces)
            engine.fail("a card fell off the bus")
            engine.allow()
            with pytest.raises(anthropic.APIStatusError, match="engine"):
                list(pieces)


def test_the_asynchronous_client(server: Running, client: anthropic.Anthropic) -> None:
    expected = texts(ask(client))

    async def ask_all() -> list[str]:
        async with anthropic.AsyncAnthropic(
            base_url=server.url, auth_token=KEY, api_key=None, max_retries=0, timeout=WAIT_SECONDS
        ) as opened:
            body: dict[str, Any] = {
                "model": "smol",
                "messages": QUESTION,
                "max_tokens": 40,
                "extra_body": {"temperature": 0},
            }

            async def streamed() -> str:
                async with opened.messages.stream(**body) as stream:
                    return "".join([piece async for piece in stream.text_stream])

            async def whole() -> str:
                return texts(await opened.messages.create(**body))

            return [*await asyncio.gather(*(streamed() if i % 2 else whole() for i in range(6)))]

    assert asyncio.run(ask_all()) == [expected] * 6
