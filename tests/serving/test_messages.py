"""/v1/messages over a scripted engine: translation, blocks and events, thoughts, tools, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from qengine.serving.chat_form import template_message
from qengine.serving.limits import LIMITS
from qengine.serving.messages_input import messages_of
from qengine.serving.messages_protocol import MessagesRequest
from qengine.serving.protocol import parse_request
from tests.serving.chat_templates import HERMES
from tests.serving.response_events import named_events
from tests.serving.running import Running, serving
from tests.serving.scripted_engine import NAN_PROMPT, NEVER_FITS_PROMPT, SCRIPT, ScriptedEngine
from tests.waiting import wait_until

PATH = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
TOOL: dict[str, Any] = {"name": "add", "description": "Adds", "input_schema": {"type": "object"}}
THOUGHTS = "<think>\nOne and two.\n</think>\n\n"
CALLS = (
    '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    '<tool_call>{"name": "add", "arguments": {"b": [2, "x"]}}</tool_call>'
)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    engine = ScriptedEngine(max_model_len=512)
    engine.tokenizer = engine.tokenizer.with_chat_template(HERMES)
    engine.answers.update(ponder=f"{THOUGHTS}Three.", tools=f"Well. {CALLS}", both=f"{THOUGHTS}Now {CALLS}")
    engine.answers["cut"] = '<tool_call>{"name": "add", "arguments": {"a": [1, 2, 3, 4, 5, 6, 7, 8, 9]}}</tool_call>'
    with serving(engine) as running:
        yield running


def body(text: Any = "hi", **more: Any) -> dict[str, Any]:
    return {"model": "scripted", "max_tokens": 300, "messages": [{"role": "user", "content": text}], **more}


def applied(events: list[Any]) -> dict[str, Any]:
    """What a client holds that applies the events in order; checks the order on the way."""
    first, *rest = events
    assert first["type"] == "message_start"
    message: dict[str, Any] = first["message"]
    assert (message["content"], message["stop_reason"]) == ([], None)
    is_open, arguments = False, ""
    kinds = [event["type"] for event in rest]
    assert kinds[-2:] == ["message_delta", "message_stop"]
    assert kinds.count("ping") == (1 if "content_block_start" in kinds else 0)
    for event in rest:
        if event["type"] == "content_block_start":
            assert not is_open
            assert event["index"] == len(message["content"])
            message["content"].append(event["content_block"])
            is_open, arguments = True, ""
        elif event["type"] == "content_block_delta":
            assert is_open
            assert event["index"] == len(message["content"]) - 1
            delta, block = event["delta"], message["content"][-1]
            if delta["type"] == "input_json_delta":
                arguments += delta["partial_json"]
            else:
                field = delta["type"].removesuffix("_delta")
                block[field] += delta[field]
        elif event["type"] == "content_block_stop":
            is_open = False
            if message["content"][-1]["type"] == "tool_use":
                message["content"][-1]["input"] = json.loads(arguments or "{}")
        elif event["type"] == "message_delta":
            assert not is_open
            message |= event["delta"]
            message["usage"] |= event["usage"]
    return message


def both(server: Running, request: dict[str, Any]) -> dict[str, Any]:
    """The message, whole and streamed, which must be the same but for ids."""
    whole = server.post(PATH, request)
    assert whole.status_code == 200, whole.text
    streamed = applied(named_events(server.post(PATH, {**request, "stream": True})))
    message: dict[str, Any] = whole.json()
    for found in (message, streamed):
        del found["id"]
        for block in found["content"]:
            if block["type"] == "tool_use":
                assert block.pop("id").startswith("call_")
    assert streamed == message
    return message


def refusal(response: httpx.Response, status: int, kind: str = "invalid_request_error") -> str:
    assert response.status_code == status, response.text
    found = response.json()
    assert {*found} == {"type", "error"}
    assert found["type"] == "error"
    assert {*found["error"]} == {"type", "message"}
    assert found["error"]["type"] == kind
    return str(found["error"]["message"])


# Answers


def test_text(server: Running) -> None:
    message = both(server, body(max_tokens=20))
    assert message["content"][0]["type"] == "text"
    assert message["stop_reason"] == "max_tokens"
    assert message["usage"]["output_tokens"] == 20
    stopped = both(server, body(stop_sequences=["no", "天空"]))
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "天空")
    assert stopped["content"] == [{"type": "text", "text": SCRIPT.split("天空")[0]}]


def test_the_context_ends_what_max_tokens_does_not(server: Running) -> None:
    message = both(server, body(max_tokens=100_000))
    assert message["stop_reason"] == "model_context_window_exceeded"
    assert message["usage"]["input_tokens"] + message["usage"]["output_tokens"] == 512


def test_thoughts_and_calls_are_blocks(server: Running) -> None:
    thoughts = {"type": "thinking", "thinking": "One and two.", "signature": ""}
    calls = [{"type": "tool_use", "name": "add", "input": given} for given in ({"a": 1}, {"b": [2, "x"]})]
    assert both(server, body("ponder"))["content"] == [thoughts, {"type": "text", "text": "Three."}]
    message = both(server, body("both", tools=[TOOL]))
    assert [block["type"] for block in message["content"]] == ["thinking", "text", "tool_use", "tool_use"]
    assert message["content"][2:] == calls
    assert message["stop_reason"] == "tool_use"
    one = both(server, body("tools", tools=[TOOL], tool_choice={"type": "auto", "disable_parallel_tool_use": True}))
    assert one["content"][1:] == calls[:1]
    assert both(server, body("ponder", thinking={"type": "adaptive", "display": "omitted"}))["content"] == [
        {"type": "text", "text": "Three."}
    ]


def test_a_call_that_was_cut_has_no_arguments(server: Running) -> None:
    request = body("cut", tools=[TOOL], max_tokens=20)
    message = server.post(PATH, request).json()
    assert message["stop_reason"] == "max_tokens"
    assert message["content"][-1]["input"] == {}


def test_thoughts_end_with_their_budget(server: Running) -> None:
    engine = server.engine
    engine.answers["</think>"] = "So: three."
    engine.answers["long"] = "<think>\n" + "and so on " * 40 + "</think>\n\nNever."
    try:
        message = both(server, body("long", thinking={"type": "enabled", "budget_tokens": 12}))
        prompt = engine.prepared[-1].prompt
    finally:
        del engine.answers["</think>"], engine.answers["long"]
    kinds = [block["type"] for block in message["content"]]
    assert kinds == ["thinking", "text"]
    assert message["content"][0]["thinking"].startswith("and so on and")
    assert len(message["content"][0]["thinking"]) < 40
    assert message["content"][1]["text"] == "So: three."
    assert message["stop_reason"] == "end_turn"
    assert prompt.endswith("\n</think>\n\n")
    tokenizer = engine.tokenizer
    answer = len(tokenizer.encode("So: three.", add_special_tokens=False))
    assert message["usage"]["output_tokens"] == 12 + answer
    plain = server.post(PATH, body("long", thinking={"type": "disabled"})).json()
    assert message["usage"]["input_tokens"] < plain["usage"]["input_tokens"]  # Without the thoughts that were added.
    server.wait_until_quiet()


def test_progress_comes_before_the_message(server: Running) -> None:
    options = {"stream": True, "stream_options": {"include_progress": True}}
    server.engine.hold()
    with server.client() as client, client.stream("POST", PATH, json=body(max_tokens=3, **options)) as response:
        server.engine.allow()  # What comes before the first token has come: it began the answer.
        response.read()
    events = named_events(response)
    kinds = [event["type"] for event in events]
    start = kinds.index("message_start")
    assert start > 0
    assert {*kinds[:start]} == {"qengine:progress"}
    assert applied(events[start:])["usage"]["output_tokens"] == 3


def test_what_is_counted_is_what_is_computed(server: Running) -> None:
    for more in ({}, {"system": "Be brief.", "tools": [TOOL]}):
        counted = server.post(COUNT, {**body(**more), "max_tokens": None}).json()
        usage = server.post(PATH, body(max_tokens=1, **more)).json()["usage"]
        assert counted == {"input_tokens": usage["input_tokens"]}


# Translation


def shown(**request: Any) -> list[dict[str, Any]]:
    """What the chat template is given."""
    parsed = parse_request(MessagesRequest, {"model": "m", "max_tokens": 1, **request})
    return [template_message(message, index) for index, message in enumerate(messages_of(parsed))]


def test_a_conversation_with_calls_as_templates_read_it() -> None:
    call = {"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 1}, "cache_control": {"type": "ephemeral"}}
    other = {**call, "id": "c2", "input": {}}
    conversation = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral", "ttl": "1h"}}],
        },
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "t", "signature": "s"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "b"}, call, other]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "3"}]},
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "c2",
                    "is_error": True,
                    "content": [{"type": "text", "text": "no"}],
                },
                {"type": "text", "text": "go on"},
            ],
        },
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]},
    ]
    assert shown(messages=conversation, system=[{"type": "text", "text": "S"}]) == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "a"},
        {
            "role": "assistant",
            "content": "b",
            "reasoning": "t",
            "reasoning_content": "t",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}},
                {"id": "c2", "type": "function", "function": {"name": "add", "arguments": {}}},
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "name": "add", "content": "3"},
        {"role": "tool", "tool_call_id": "c2", "name": "add", "content": "Error: no"},
        {"role": "user", "content": "go on"},
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]},
    ]


def test_thinking_is_an_option_of_the_template(server: Running) -> None:
    prompts = []
    for thinking in ({"type": "enabled", "budget_tokens": 1}, {"type": "disabled"}, {"type": "adaptive"}, None):
        assert server.post(PATH, body(max_tokens=2, thinking=thinking)).status_code == 200
        prompts.append(server.engine.prepared[-1].prompt)
    assert prompts[1].endswith("<think>\n\n</think>\n\n")
    assert prompts[0] == prompts[2] == prompts[3] != prompts[1]


def test_a_drain_during_thoughts_lets_the_answer_come(server: Running) -> None:
    engine, admission = server.engine, server.service.ready_engine().admission
    engine.answers["drained"] = "<think>\n" + "one and two " * 20 + "\n</think>\n\nThree."
    request = body("drained", stream=True, thinking={"type": "enabled", "budget_tokens": 30})
    engine.hold()
    try:
        engine.allow(16)
        with server.client() as client, client.stream("POST", PATH, json=request) as response:
            lines = response.iter_lines()
            next(line for line in lines if "content_block_delta" in line)
            admission.begin_drain()
            engine.allow()
            rest = list(lines)
    finally:
        admission.is_draining = False
        engine.allow()
    assert "event: message_stop" in rest
    assert not any("error" in line for line in rest)
    server.wait_until_quiet()


def test_arguments_that_are_no_characters_or_no_json_do_no_harm(server: Running) -> None:
    call = '<tool_call>{"name": "add", "arguments": %s}</tool_call>'
    server.engine.answers["halves"] = call % r'{"\ud800": ["\udfff", "\ud83d\ude42"]}'
    server.engine.answers["escaped"] = call % r'"{\"a\": \"\ud800\"}"'
    server.engine.answers["huge"] = call % '{"a": 1e999, "b": NaN}'
    expected = {"halves": {"\ufffd": ["\ufffd", "\U0001f642"]}, "escaped": {"a": "\ufffd"}, "huge": {}}
    for text, arguments in expected.items():
        response = server.post(PATH, body(text, tools=[TOOL]))
        assert response.status_code == 200
        assert [block["input"] for block in response.json()["content"]] == [arguments]
        # A stream passes on what the model wrote; it must come to its end.
        streamed = applied(named_events(server.post(PATH, body(text, tools=[TOOL], stream=True))))
        assert [block["name"] for block in streamed["content"]] == ["add"]


# Refusals


def image(**more: Any) -> dict[str, Any]:
    return {"type": "image", "source": {"type": "url", "url": "http://169.254.169.254/"}, **more}


def user(*blocks: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(blocks)}]}


RESULT = {"type": "tool_result", "tool_use_id": "x", "content": "a"}
USE = {"type": "tool_use", "id": "x", "name": "add", "input": {}}
TEXT = {"type": "text", "text": "a"}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 2**63}, "max_tokens"),
        ({"max_tokens": "10"}, "max_tokens is '10'"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": {}}, "messages"),
        ({"messages": [{"role": "user", "content": "a"}] * 2049}, "messages"),
        ({"messages": [{"role": "root", "content": "a"}]}, "role"),
        ({"messages": [{"content": "a"}]}, "role"),
        ({"messages": [{"role": "user"}]}, "content"),
        ({"messages": [{"role": "user", "content": 3}]}, "content"),
        ({"messages": [{"role": "user", "content": None}]}, "content"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "role"),
        (user(image()), "reads no images"),
        (user({"type": "document", "source": {"type": "text", "data": "a"}}), "reads no images or documents"),
        (user({"type": "search_result"}), "content"),
        (user({"type": "redacted_thinking", "data": "x"}), "content"),
        (user({"text": "a"}), "content"),
        (user("a"), "content"),
        (user({"type": "text", "text": 3}), "text is 3"),
        (user({"type": ["text"], "text": "a"}), "content"),
        (user({**TEXT, "cache_control": {"type": "forever"}}), "cache_control"),
        (user(USE), "role user cannot hold"),
        (user({"type": "thinking", "thinking": "a"}), "role user cannot hold"),
        (user(RESULT), "no message before calls"),
        (user({"type": "tool_result", "content": "a"}), "tool_use_id is missing"),
        ({"messages": [{"role": "assistant", "content": [RESULT]}]}, "role assistant cannot hold"),
        ({"messages": [{"role": "assistant", "content": [USE]}, {"role": "user", "content": [image()]}]}, "images"),
        (
            {
                "messages": [
                    {"role": "assistant", "content": [USE]},
                    {"role": "user", "content": [{**RESULT, "content": [image()]}]},
                ]
            },
            "content",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": [USE]}]},
            "send their results",
        ),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}, "no text"),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": [USE]},
                    {"role": "user", "content": [RESULT] * (LIMITS.num_messages - 1)},
                ]
            },
            f"messages are {LIMITS.num_messages + 1} with each tool_result",
        ),
        ({"system": 3}, "system"),
        ({"system": [image()]}, "system"),
        ({"stop_sequences": ["a"] * 9}, "stop_sequences"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"stop_sequences": ["a" * 257]}, "stop_sequences"),
        ({"stop": ["a"]}, "it is called stop_sequences here"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"stream": "yes"}, "stream"),
        ({"n": 2}, "one answer"),
        ({"logprobs": True}, "log-probabilities"),
        ({"response_format": {"type": "json_object"}}, "output_config.format"),
        ({"container": "c"}, "no containers"),
        ({"mcp_servers": [{"type": "url", "url": "http://x"}]}, "calls no other servers"),
        ({"context_management": {"edits": []}}, "context_management"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"prompt_embeds": "x"}, "prompt_embeds"),
        ({"tools": [TOOL] * 129}, "tools"),
        ({"tools": [TOOL, TOOL]}, "two tools have the name"),
        ({"tools": [{"name": "f"}]}, "input_schema is missing"),
        ({"tools": [{**TOOL, "name": "a b"}]}, r"tools\[0\].name"),
        ({"tools": [{**TOOL, "input_schema": {"type": "array"}}]}, "input_schema"),
        (
            {"tools": [{**TOOL, "input_schema": {"properties": {"a": {"pattern": 5}}}}]},
            "input_schema has the pattern 5",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "your program runs"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "your program runs"),
        ({"tools": [{**TOOL, "input_examples": [{}]}]}, "input_examples"),
        ({"tools": [{**TOOL, "defer_loading": True}]}, "defer_loading"),
        ({"tools": [{**TOOL, "allowed_callers": ["code_execution_20250825"]}]}, "allowed_callers"),
        ({"tool_choice": {"type": "any"}}, "there are no tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name is missing"),
        ({"tools": [TOOL], "tool_choice": {"type": "auto", "name": "add"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "sub"}}, "the tools are: add"),
        ({"tools": [TOOL], "tool_choice": {"type": "required"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "auto"}, "tool_choice"),
        ({"thinking": {"type": "enabled"}}, "budget_tokens is missing"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 300}}, "expected less than max_tokens"),
        ({"thinking": {"type": "disabled", "budget_tokens": 9}}, "budget_tokens"),
        ({"thinking": {"type": "between_tools"}}, "thinking"),
        ({"thinking": True}, "thinking"),
        ({"output_config": {"effort": "high"}}, "knows no effort"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": 3}}}}, "structured output cannot"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "schema"),
        ({"metadata": "me"}, "metadata"),
        ({"chat_template_kwargs": {"tokenize": True}}, "set by the server"),
        ({"cache_salt": "a/b"}, "cache_salt"),
        (user({"type": "text", "text": NEVER_FITS_PROMPT}), "never fit"),
        (user({"type": "text", "text": "x " * 5000}), "characters"),
    ],
)
def test_what_is_refused(server: Running, more: dict[str, Any], words: str) -> None:
    request = {name: value for name, value in {**body(), **more}.items() if value is not None}
    counts_too = (
        "max_tokens" not in more
        and "max_tokens" not in words
        and "structured" not in words
        and NEVER_FITS_PROMPT not in str(more)
    )
    with server.client() as client:
        for stream in ({}, {"stream": True}):
            message = refusal(client.post(PATH, json={**stream, **request}), 400)
            assert re.search(words, message), message
        if counts_too:
            refusal(client.post(COUNT, json=request), 400)


def test_a_logit_bias_reaches_the_engine(server: Running) -> None:
    request = body(logit_bias={"5": 1})
    assert server.post(PATH, request).status_code == 200
    assert server.engine.prepared[-1].params.logit_bias == {5: 1.0}
    assert server.post(COUNT, request).json()["input_tokens"] > 0


def test_a_system_prompt_is_no_message_of_the_limit() -> None:
    turns = [{"role": role, "content": "a"} for role in ("assistant", "user") * (LIMITS.num_messages // 2)]
    request = parse_request(MessagesRequest, {**body(), "system": "b", "messages": turns})
    assert len(messages_of(request)) == LIMITS.num_messages + 1


def test_errors_of_every_layer_have_anthropics_shape(server: Running) -> None:
    for path in (PATH, COUNT):
        refusal(server.get(path), 405)
        refusal(server.post(path, {**body(), "model": "../../etc/passwd"}), 404, "not_found_error")
        refusal(server.post(path, {**body(), "model": "x" * 2000}), 400)
        with server.client() as client:
            for content in (b"", b"{", b"null", b"[]", b'"x"', b'{"model": NaN}', b'{"model": "\xff"}'):
                refusal(client.post(path, content=content, headers={"content-type": "application/json"}), 400)
            refusal(client.post(path, content=b"{}", headers={"content-type": "text/plain"}), 415)
            refusal(client.post(path, headers={f"x-{index}": "1" for index in range(200)}), 431)
    refusal(server.get("/v1/messages/nothing"), 404, "not_found_error")
    assert "param" in server.get("/v1/messagesx").json()["error"]
    assert "param" in server.post("/v1/chat/completions", {}).json()["error"]
    refusal(server.post(PATH, body(NAN_PROMPT)), 500, "api_error")
    server.wait_until_quiet()


def test_a_client_that_leaves_aborts(server: Running) -> None:
    engine = server.engine
    engine.hold(listens=True)
    try:
        num_aborted = len(engine.aborted)
        engine.allow(2)
        with server.client() as client, client.stream("POST", PATH, json=body(stream=True)) as response:
            for line in response.iter_lines():
                if "content_block_delta" in line:
                    break
        wait_until(lambda: len(engine.aborted) == num_aborted + 1)
    finally:
        engine.allow()
    server.wait_until_quiet()
