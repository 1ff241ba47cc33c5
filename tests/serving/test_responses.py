"""/v1/responses with the scripted engine: items, events, what the input becomes, what is refused, and faults."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qengine.serving.errors import ApiError
from qengine.serving.pieces import Piece
from qengine.serving.protocol import parse_request
from qengine.serving.responses_output import ResponseOutput
from qengine.serving.responses_protocol import ResponsesRequest
from tests.serving.chat_templates import HERMES, MISTRAL
from tests.serving.response_events import named_events, replay, without_ids
from tests.serving.running import Running, serving
from tests.serving.scripted_engine import DIE_PROMPT, NAN_PROMPT, NEVER_FITS_PROMPT, SCRIPT, ScriptedEngine
from tests.serving.test_http import assert_error, chat_body
from tests.waiting import wait_until

URL = "/v1/responses"
ADD: dict[str, Any] = {"type": "function", "name": "add", "parameters": {"type": "object"}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
THOUGHTS = "<think>\nWell.\n\nSo.\n</think>\n\n"


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    with serving(ScriptedEngine(max_model_len=512), served_model_names=("scripted", "alias")) as running:
        yield running


@pytest.fixture
def server(shared: Running) -> Iterator[Running]:
    tokenizer = shared.engine.tokenizer
    yield shared
    shared.engine.tokenizer = tokenizer
    shared.engine.answers.clear()
    shared.engine.grammars.clear()
    shared.wait_until_quiet()


def speak(server: Running, template: str, answer: str) -> None:
    """Have the model speak a template's language and say `answer`."""
    server.engine.tokenizer = server.engine.tokenizer.with_chat_template(template)
    server.engine.answers["hi"] = answer


def body(**more: Any) -> dict[str, Any]:
    return {"model": "scripted", "input": "hi", **more}


def ask(server: Running, **more: Any) -> dict[str, Any]:
    """The response, which must be the same with and without streaming."""
    whole = server.post(URL, body(**more))
    assert whole.status_code == 200, whole.text
    streamed = replay(named_events(server.post(URL, body(stream=True, **more))))
    assert without_ids(streamed) == without_ids(whole.json())
    return whole.json()


def kinds(response: dict[str, Any]) -> list[str]:
    return [item["type"] for item in response["output"]]


def text(response: dict[str, Any]) -> str:
    parts = [part for item in response["output"] if item["type"] == "message" for part in item["content"]]
    return "".join(part["text"] for part in parts)


# Answers


def test_an_answer_is_one_message(server: Running) -> None:
    server.engine.answers["hi"] = SCRIPT
    response = ask(server, metadata={"a": "b"}, instructions="Be brief.", store=True, user="someone", temperature=0.5)
    assert response["object"] == "response"
    assert response["id"].startswith("resp_")
    assert (response["status"], response["incomplete_details"], response["error"]) == ("completed", None, None)
    assert (response["store"], response["background"], response["previous_response_id"]) == (False, False, None)
    assert (response["metadata"], response["instructions"]) == ({"a": "b"}, "Be brief.")
    assert (response["temperature"], response["top_p"]) == (0.5, 1.0)
    assert kinds(response) == ["message"]
    assert text(response) == SCRIPT
    counts = response["usage"]
    assert counts["output_tokens"] == len(server.engine.script)
    assert counts["total_tokens"] == counts["input_tokens"] + counts["output_tokens"]
    assert counts["input_tokens_details"]["cached_tokens"] == 0
    assert counts["output_tokens_details"]["reasoning_tokens"] == 0


def test_an_answer_cut_by_max_output_tokens_is_incomplete(server: Running) -> None:
    response = ask(server, max_output_tokens=3)
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert response["output"][0]["status"] == "incomplete"
    assert response["usage"]["output_tokens"] == 3


def test_the_same_text_as_chat(server: Running) -> None:
    chat = server.post("/v1/chat/completions", chat_body(max_tokens=20)).json()
    response = ask(server, max_output_tokens=20)
    assert text(response) == chat["choices"][0]["message"]["content"]
    assert response["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]


def test_thoughts_text_and_calls_are_items_of_their_own(server: Running) -> None:
    speak(server, HERMES, f"{THOUGHTS}Let me see.\n{CALL}\n{CALL}")
    response = ask(server, tools=[ADD])
    assert kinds(response) == ["reasoning", "message", "function_call", "function_call"]
    thoughts, message, *calls = response["output"]
    assert thoughts["content"] == [{"type": "reasoning_text", "text": "Well.\n\nSo."}]
    assert thoughts["summary"] == []
    assert message["content"][0]["text"] == "Let me see."
    assert [(call["name"], json.loads(call["arguments"])) for call in calls] == [("add", {"a": 1})] * 2
    assert len({call["call_id"] for call in calls} | {call["id"] for call in calls}) == 4
    assert all(item["status"] == "completed" for item in response["output"])
    tokens = len(server.engine.tokenizer.encode("Well.\n\nSo.", add_special_tokens=False))
    assert response["usage"]["output_tokens_details"]["reasoning_tokens"] == tokens


def test_ids_of_calls_are_those_that_a_mistral_template_takes(server: Running) -> None:
    speak(server, MISTRAL, '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}]')
    response = ask(server, tools=[ADD])
    assert kinds(response) == ["function_call"]
    assert len(response["output"][0]["call_id"]) == 9


@pytest.mark.parametrize("num_tokens", [4, 12, 20, 40])
def test_an_answer_cut_anywhere_ends_its_item(server: Running, num_tokens: int) -> None:
    speak(server, HERMES, f"{THOUGHTS}Let me see.\n{CALL}")
    response = ask(server, tools=[ADD], max_output_tokens=num_tokens)
    assert response["status"] == "incomplete"
    statuses = [item["status"] for item in response["output"]]
    assert statuses == ["completed"] * (len(statuses) - 1) + ["incomplete"] * bool(statuses)


def test_an_answer_without_text_is_an_empty_message(server: Running) -> None:
    speak(server, HERMES, THOUGHTS)
    response = ask(server)
    assert kinds(response) == ["reasoning", "message"]
    assert response["output"][1]["content"][0]["text"] == ""


def test_thoughts_can_be_left_out(server: Running) -> None:
    speak(server, HERMES, f"{THOUGHTS}Yes.")
    assert kinds(ask(server, reasoning={"summary": "auto"})) == ["reasoning", "message"]
    quiet = ask(server, reasoning={"effort": "none"})
    assert "</think>" in server.engine.prepared[-1].prompt
    assert quiet["reasoning"]["effort"] == "none"


def test_an_effort_goes_to_a_template_that_knows_it(server: Running) -> None:
    speak(server, HERMES + "{{ reasoning_effort }}", "fine")
    ask(server, reasoning={"effort": "high"})
    assert server.engine.prepared[-1].prompt.endswith("high")


def test_a_form_and_a_forced_call_make_grammars(server: Running) -> None:
    schema = {"type": "object", "properties": {"zip": {"type": "integer"}}, "required": ["zip"]}
    ask(server, text={"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}})
    assert "zip" in server.engine.grammars[-1].text
    ask(server, text={"format": {"type": "json_object"}})
    assert len(server.engine.grammars) == 4
    ask(server, text={"format": {"type": "text"}})
    assert len(server.engine.grammars) == 4
    speak(server, HERMES, CALL)
    ask(server, tools=[ADD], tool_choice="required", parallel_tool_calls=False)
    ask(server, tools=[ADD, {**ADD, "name": "other"}], tool_choice={"type": "function", "name": "other"})
    assert "other" in server.engine.grammars[-1].text
    assert "add" not in server.engine.grammars[-1].text


def test_only_allowed_tools_are_there(server: Running) -> None:
    speak(server, HERMES, CALL)
    tools = [ADD, {**ADD, "name": "other"}]
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "add"}]}
    response = ask(server, tools=tools, tool_choice=choice)
    assert "other" not in server.engine.prepared[-1].prompt
    assert response["tool_choice"] == choice
    assert [tool["name"] for tool in response["tools"]] == ["add", "other"]
    choice["tools"] = [{"type": "function", "name": "nobody"}]
    assert_error(server.post(URL, body(tools=tools, tool_choice=choice)), 400, param="tool_choice")


@pytest.mark.parametrize("more", [{"top_logprobs": 1}, {"include": ["message.output_text.logprobs"]}], ids=str)
def test_log_probabilities(server: Running, more: dict[str, Any]) -> None:
    response = ask(server, max_output_tokens=30, **more)
    (part,) = response["output"][0]["content"]
    assert len(part["logprobs"]) == 30
    assert b"".join(bytes(entry["bytes"]) for entry in part["logprobs"]).decode() == part["text"]
    assert ask(server, max_output_tokens=4)["output"][0]["content"][0]["logprobs"] == []


# What the input becomes


def input_text(said: str) -> dict[str, str]:
    return {"type": "input_text", "text": said}


def prompt(server: Running, items: Any, **more: Any) -> str:
    speak(server, HERMES, "fine")
    response = server.post(URL, body(input=items, **more))
    assert response.status_code == 200, response.text
    return str(server.engine.prepared[-1].prompt)


def test_instructions_and_text(server: Running) -> None:
    found = prompt(server, "hi", instructions="Be brief.")
    assert found == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_a_whole_conversation_goes_back_as_it_came(server: Running) -> None:
    speak(server, HERMES, f"{THOUGHTS}Let me see.\n{CALL}\n{CALL}")
    first = server.post(URL, body(tools=[ADD])).json()
    calls = first["output"][2:]
    items = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [input_text("a"), input_text("b")]},
        *first["output"],
        {"type": "function_call_output", "call_id": calls[0]["call_id"], "output": "one"},
        {"type": "function_call_output", "call_id": calls[1]["call_id"], "output": [input_text("two")]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Three.", "annotations": []}]},
        {"role": "user", "content": "hi"},
    ]  # fmt: skip
    found = prompt(server, items, tools=[ADD])
    turns = [turn.split("\n", 1) for turn in found.split("<|im_start|>")[1:]]
    assert [role for role, _ in turns] == [
        *("system", "system", "user", "assistant", "tool", "tool", "assistant", "user", "assistant")
    ]
    assert [content.split("<|im_end|>")[0] for _, content in turns[1:]] == [
        "Be brief.",
        "ab",
        'Let me see.<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>' + CALL,
        "one",
        "two",
        "Three.",
        "hi",
        "",
    ]


def test_thoughts_reach_a_template_that_shows_them(server: Running) -> None:
    shows = "{% for m in messages %}[{{ m.role }}:{{ m.reasoning_content }}:{{ m.content }}]{% endfor %}"
    server.engine.tokenizer = server.engine.tokenizer.with_chat_template(shows)
    items = [
        {"role": "user", "content": "hi"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "T"}]},
        {"role": "assistant", "content": "A"},
        {"role": "assistant", "content": "B"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "S"}]},
    ]
    server.post(URL, body(input=items))
    assert server.engine.prepared[-1].prompt == "[user::hi][assistant:T:A][assistant::B][assistant:S:]"


def test_sampling_fields_and_extras_arrive(server: Running) -> None:
    more = {
        "temperature": 0.3,
        "top_p": 0.5,
        "top_k": 7,
        "min_p": 0.1,
        "seed": 5,
        "logit_bias": {"5": -100},
        "stop": ["zzz"],
    }
    server.post(URL, body(max_output_tokens=9, **more))
    params = server.engine.prepared[-1].params
    found = {name: getattr(params, name) for name in more}
    assert {**found, "stop": list(params.stop_strings)} == {**more, "logit_bias": {5: -100.0}}
    assert params.max_tokens == 9


# Refusals


def message(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


def call(**more: Any) -> list[dict[str, Any]]:
    return [{"type": "function_call", "call_id": "c", "name": "add", "arguments": "{}", **more}]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"background": True}, "background"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt"),
    ({"moderation": {"model": "m"}}, "moderation"),
    ({"context_management": [{"type": "compaction"}]}, "context_management"),
    ({"max_tokens": 5}, "max_tokens"),
    ({"response_format": {"type": "text"}}, "response_format"),
    ({"n": 2}, "n"),
    ({"tools": [{"type": "web_search"}]}, "tools[0]"),
    ({"tools": [ADD, {"type": "mcp", "server_label": "x"}]}, "tools[1]"),
    ({"tools": [{"type": "custom", "name": "x"}]}, "tools[0]"),
    ({"tools": [{**ADD, "defer_loading": True}]}, "tools[0].defer_loading"),
    ({"tools": [{**ADD, "parameters": {"type": "array"}}]}, "tools[0].parameters"),
    ({"tools": [ADD, ADD]}, "tools[1].name"),
    ({"tools": [{**ADD, "name": "a b"}]}, "tools[0].name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "web_search"}}, "tool_choice"),
    ({"tools": [ADD], "tool_choice": {"type": "function", "name": "nobody"}}, "tool_choice"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
    ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
    ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "strnig"}}}}, "text.format"),
    ({"text": {"format": {"type": "json_object"}}, "guided_regex": "a"}, "guided_regex"),
    ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
    ({"reasoning": {"effort": "loud"}}, "reasoning.effort"),
    ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
    ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
    ({"reasoning": {"context": "all_turns"}}, "reasoning.context"),
    ({"include": ["nothing"]}, "include[0]"),
    ({"top_logprobs": 21}, "top_logprobs"),
    ({"top_logprobs": -1}, "top_logprobs"),
    ({"truncation": "middle"}, "truncation"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 600}, "input"),
    ({"max_completion_tokens": 5}, "max_completion_tokens"),
    ({"logprobs": True}, "logprobs"),
    ({"thinking": {"type": "enabled"}}, "thinking"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"metadata": {"a": "x" * 513}}, "metadata.a"),
    ({"metadata": {str(index): "x" for index in range(17)}}, "metadata"),
    ({"stream_options": {"include_progress": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"input": []}, "input"),
    ({"input": None}, "input"),
    ({"input": 5}, "input"),
    ({"input": [5]}, "input[0]"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
    ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0]"),
    ({"input": message({"type": "input_image", "image_url": "http://169.254.169.254/"})}, "input[0].content[0]"),
    ({"input": message({"type": "input_file", "file_id": "x"})}, "input[0].content[0]"),
    ({"input": message({"type": "input_text", "text": 5})}, "input[0].content[0].text"),
    ({"input": message("x")}, "input[0].content[0]"),
    ({"input": call(arguments="{")}, "input[0].arguments"),
    ({"input": call(arguments="[]")}, "input[0].arguments"),
    ({"input": call(call_id="")}, "input[0].call_id"),
    ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
    ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "gAAA"}]}, "input[0].encrypted_content"),
    ({"input": "x" * 9000}, "input"),
    ({"input": "x " * 2000}, "input"),
    ({"input": NEVER_FITS_PROMPT}, "input"),
    ({"temperature": 3}, "temperature"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"chat_template": "x"}, "chat_template"),
    ({"chat_template_kwargs": {"unheard_of": 1}}, "chat_template_kwargs"),
]


@pytest.mark.parametrize(("bad", "param"), BAD, ids=lambda value: str(value)[:70])
def test_a_bad_request_names_its_field_as_it_is_called_here(server: Running, bad: dict[str, Any], param: str) -> None:
    server.engine.tokenizer = server.engine.tokenizer.with_chat_template(HERMES)
    said = assert_error(server.post(URL, body(**bad)), 400, param=param)
    assert "messages" not in said
    if "stream" not in bad and "stream_options" not in bad:
        assert assert_error(server.post(URL, body(stream=True, **bad)), 400, param=param) == said


def test_tools_for_a_model_that_knows_none(server: Running) -> None:
    assert_error(server.post(URL, body(tools=[ADD])), 400, param="tools", code="unsupported_parameter")
    assert server.post(URL, body(tools=[ADD], tool_choice="none")).status_code == 200


HARMLESS: list[dict[str, Any]] = [
    {"store": True},
    {"store": False},
    {"background": False},
    {"previous_response_id": None, "conversation": None, "prompt": None},
    {"truncation": "auto"},
    {"truncation": "disabled"},
    {"include": ["reasoning.encrypted_content", "file_search_call.results"]},
    {"reasoning": {}},
    {"reasoning": {"effort": "none", "summary": "auto"}},
    {"text": {}},
    {"text": {"verbosity": "medium"}},
    {"max_tool_calls": 3},
    {"service_tier": "flex", "safety_identifier": "x", "prompt_cache_key": "y", "user": "z"},
    {"metadata": {"k" * 64: "v" * 512}},
    {"context_management": []},
    {"tools": [], "tool_choice": "auto"},
    {"parallel_tool_calls": True},
]


@pytest.mark.parametrize("fine", HARMLESS, ids=str)
def test_what_asks_for_nothing_else_is_taken(server: Running, fine: dict[str, Any]) -> None:
    assert text(ask(server, max_output_tokens=8, **fine)) == text(ask(server, max_output_tokens=8))


def test_a_model_that_is_not_here_and_one_by_its_other_name(server: Running) -> None:
    assert_error(server.post(URL, body(model="other")), 404, param="model", code="model_not_found")
    assert ask(server, model="alias", max_output_tokens=2)["model"] == "scripted"


_NAMES = st.sampled_from(["type", "role", "content", "text", "format", "name", "call_id", "output", "x"])
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES, inner, max_size=4),
    max_leaves=8,
)


@settings(derandomize=True, max_examples=400, deadline=None)
@given(name=st.sampled_from(sorted(ResponsesRequest.model_fields)), value=_VALUES)
def test_any_value_gives_a_request_or_a_400(name: str, value: Any) -> None:
    refusals: list[ApiError] = []
    try:
        parse_request(ResponsesRequest, body(**{"stream": True, name: value}))
    except ApiError as error:
        refusals.append(error)
    for refused in refusals:
        assert refused.status == 400
        json.dumps(refused.body(), allow_nan=False)


# Faults


def test_a_request_that_fails_at_once_has_a_status_of_its_own(server: Running) -> None:
    for stream in (False, True):
        assert "NaN" in assert_error(server.post(URL, body(input=NAN_PROMPT, stream=stream)), 500)


def test_a_stream_that_breaks_ends_with_what_had_come() -> None:
    engine = ScriptedEngine()
    with serving(engine) as server, server.client() as client, ThreadPoolExecutor(1) as pool:
        engine.hold(listens=True)
        engine.allow(6)
        with client.stream("POST", URL, json=body(stream=True)) as stream:
            killer = pool.submit(server.post, URL, body(input=DIE_PROMPT))
            wait_until(lambda: len(engine.requests) == 2)
            engine.allow(math.inf)
            stream.read()
        assert_error(killer.result(), 500, code="engine_dead")
        response = replay(named_events(stream))
        assert response["status"] == "failed"
        assert response["error"]["code"] == "server_error"
        assert "engine" in response["error"]["message"]
        assert SCRIPT.startswith(text(response)[:5])
        assert response["output"][0]["status"] == "incomplete"
        assert_error(server.post(URL, body()), 503, code="dead")


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_that_takes_too_long_has_failed_and_keeps_its_text(stream: bool) -> None:
    engine = ScriptedEngine()
    with serving(engine, request_timeout=2.0) as server:
        engine.hold()
        engine.allow(8)
        answer = server.post(URL, body(stream=stream))
        engine.allow()
        response = replay(named_events(answer)) if stream else answer.json()
        assert response["status"] == "failed"
        assert "--request-timeout" in response["error"]["message"] or "longer" in response["error"]["message"]
        assert text(response)
        server.wait_until_quiet()


def test_a_client_that_leaves_frees_its_place(server: Running) -> None:
    server.engine.hold(listens=True)
    server.engine.allow(3)
    with server.client() as client, client.stream("POST", URL, json=body(stream=True)) as stream:
        next(stream.iter_bytes())
    wait_until(lambda: not server.engine.has_unfinished)
    server.engine.allow()


# Items, piece by piece


def test_items_of_pieces_in_any_order() -> None:
    pieces = [
        Piece("content", "a"), Piece("call", "f", 0), Piece("call", "g", 1), Piece("arguments", "{}", 1),
        Piece("content", "b"), Piece("content", "c"),
    ]  # fmt: skip
    output = ResponseOutput(lambda: "call")
    entry = {"token": "a", "bytes": [97], "logprob": -1.0, "top_logprobs": []}
    events = output.feed(pieces[:3], [entry]) + output.feed(pieces[3:]) + output.feed([], [entry])
    events += output.finish("completed")
    response = {"id": "r", "output": output.items, "status": "completed"}
    all_events = [
        {"type": "response.created", "response": {**response, "status": "in_progress"}},
        {"type": "response.in_progress"},
        *events,
        {"type": "response.completed", "response": response},
    ]
    replay([{**event, "sequence_number": index} for index, event in enumerate(all_events)])
    assert [item["type"] for item in output.items] == ["message", "function_call", "function_call", "message"]
    assert [item.get("arguments") for item in output.items] == [None, "", "{}", None]
    assert output.items[0]["content"][0]["logprobs"] == [entry]
    assert output.items[3]["content"][0] == {
        "type": "output_text",
        "text": "bc",
        "annotations": [],
        "logprobs": [entry],
    }
