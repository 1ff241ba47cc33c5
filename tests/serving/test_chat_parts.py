"""Tools, forms and thoughts over HTTP, with scripted answers: what is read back, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serving.chat_templates import HERMES, LLAMA, MISTRAL, UNKNOWN_CALLS
from tests.serving.running import Running, serving
from tests.serving.scripted_engine import ScriptedEngine
from tests.serving.test_http import CHAT, TEXT, assert_error, chat_body, events, text_body

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ADD = {"type": "function", "function": {"name": "add"}}
ROME = '{"city": "Rome"}'
ANSWERS = {
    "hermes": (
        HERMES,
        f'I look.\n<tool_call>\n{{"name": "get_weather", "arguments": {ROME}}}\n</tool_call>',
        "I look.",
    ),
    "llama": (LLAMA, f'{{"name": "get_weather", "parameters": {ROME}}}', None),
    "mistral": (MISTRAL, f'I look. [TOOL_CALLS][{{"name": "get_weather", "arguments": {ROME}}}]', "I look."),
}


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    with serving(ScriptedEngine(max_model_len=1024)) as running:
        yield running


@pytest.fixture
def server(shared: Running) -> Iterator[Running]:
    """The server; a test may change template and answers."""
    tokenizer = shared.engine.tokenizer
    yield shared
    shared.wait_until_quiet()
    shared.engine.tokenizer, shared.engine.answers = tokenizer, {}
    shared.engine.grammars.clear()


def speak(server: Running, template: str, answer: str) -> None:
    """From now on the model has this template and gives this answer to "hi"."""
    server.engine.tokenizer = server.engine.tokenizer.with_chat_template(template)
    server.engine.answers = {"hi": answer}


def ask(server: Running, **more: Any) -> dict[str, Any]:
    """The choice of an answer, which streamed must be the same."""
    body = chat_body(**{"max_tokens": 200, **more})
    response = server.post(CHAT, body)
    assert response.status_code == 200, response.text
    whole: dict[str, Any] = response.json()["choices"][0]
    assert joined(server, body) == (without_ids(whole["message"]), whole["finish_reason"])
    return whole


def joined(server: Running, body: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Message and finish reason that the deltas of a stream add up to."""
    message: dict[str, Any] = {"content": ""}
    calls: list[dict[str, Any]] = []
    finish_reason = None
    for event in events(server.post(CHAT, {**body, "stream": True}))[:-1]:
        choice = event["choices"][0]
        finish_reason = choice["finish_reason"] or finish_reason
        for name, value in choice["delta"].items():
            if name == "tool_calls":
                add_call(calls, value[0])
            elif name != "role":
                message[name] = message.get(name, "") + value
    if calls:
        message |= {"content": message["content"] or None, "tool_calls": calls}
    return message, finish_reason


def add_call(calls: list[dict[str, Any]], delta: dict[str, Any]) -> None:
    if delta["index"] == len(calls):
        assert delta["type"] == "function"
        assert delta["id"]
        calls.append({"name": delta["function"]["name"], "arguments": ""})
    calls[delta["index"]]["arguments"] += delta["function"]["arguments"]


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    shown = {name: value for name, value in message.items() if name not in ("role", "refusal") and value is not None}
    shown["content"] = message["content"]
    if "tool_calls" in message:
        shown["tool_calls"] = [call["function"] for call in message["tool_calls"]]
    return shown


# Tools


@pytest.mark.parametrize("family", ANSWERS)
@pytest.mark.parametrize("choice", [None, "auto", "required"])
def test_a_call_is_read_from_the_answer(server: Running, family: str, choice: str | None) -> None:
    template, answer, content = ANSWERS[family]
    speak(server, template, answer)
    found = ask(server, tools=[ADD, WEATHER], **({"tool_choice": choice} if choice else {}))
    (call,) = found["message"]["tool_calls"]
    assert call["type"] == "function"
    assert call["function"] == {"name": "get_weather", "arguments": ROME}
    assert found["message"]["content"] == content
    assert found["finish_reason"] == "tool_calls"
    assert len(call["id"]) == 9 if family == "mistral" else call["id"].startswith("call_")
    # Only what must be forced is held to a grammar.
    assert bool(server.engine.grammars) == (choice == "required")


def test_the_template_shows_the_tools(server: Running) -> None:
    speak(server, HERMES, "fine")
    ask(server, tools=[WEATHER])
    assert json.dumps([WEATHER]) in server.engine.prepared[-1].prompt
    ask(server, tools=[WEATHER], tool_choice="none")
    assert "get_weather" in server.engine.prepared[-1].prompt


def test_a_named_tool_ends_with_stop(server: Running) -> None:
    template, answer, _ = ANSWERS["hermes"]
    speak(server, template, answer)
    named = {"type": "function", "function": {"name": "get_weather"}}
    found = ask(server, tools=[ADD, WEATHER], tool_choice=named)
    assert (len(found["message"]["tool_calls"]), found["finish_reason"]) == (1, "stop")
    assert "add" not in server.engine.grammars[-1].text


def test_parallel_calls_can_be_forbidden(server: Running) -> None:
    speak(server, HERMES, '<tool_call>{"name": "add", "arguments": {}}</tool_call>' * 3)
    assert len(ask(server, tools=[ADD])["message"]["tool_calls"]) == 3
    assert len(ask(server, tools=[ADD], parallel_tool_calls=False)["message"]["tool_calls"]) == 1


def test_without_tools_nothing_is_a_call(server: Running) -> None:
    template, answer, _ = ANSWERS["hermes"]
    speak(server, template, answer)
    for more in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        found = ask(server, **more)
        assert (found["message"]["content"], found["finish_reason"]) == (answer, "stop")


def test_an_answer_cut_in_a_call_says_so(server: Running) -> None:
    template, answer, _ = ANSWERS["llama"]
    speak(server, template, answer + " " * 50)
    num_tokens = len(server.engine.tokenizer.encode(answer, add_special_tokens=False)) - 4
    found = ask(server, tools=[WEATHER], max_tokens=num_tokens)
    assert found["finish_reason"] == "length"
    assert ROME.startswith(found["message"]["tool_calls"][0]["function"]["arguments"])


def test_strict_functions_are_held_to_their_schema(server: Running) -> None:
    template, answer, _ = ANSWERS["hermes"]
    speak(server, template, answer)
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}  # type: ignore[dict-item]
    ask(server, tools=[strict, ADD])
    assert '"city"' in server.engine.grammars[-1].text


def test_a_form_beside_tools_is_what_is_said_instead_of_a_call(server: Running) -> None:
    template, answer, _ = ANSWERS["hermes"]
    speak(server, template, answer)
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["said instead"]}}}
    ask(server, tools=[ADD], response_format=form)
    assert "said instead" in server.engine.grammars[-1].text
    refused = server.post(CHAT, chat_body(tools=[ADD], guided_regex="a"))
    assert_error(refused, 400, param="guided_regex")
    assert_error(server.post(CHAT, chat_body(tools=[ADD], tool_choice="required", response_format=form)), 400)


def test_calls_of_earlier_turns_reach_the_template_as_objects(server: Running) -> None:
    speak(server, HERMES, "fine")
    call = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Rome"}'}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "sunny"},
    ]
    ask(server, messages=messages, tools=[WEATHER])
    assert f'"arguments": {ROME}' in server.engine.prepared[-1].prompt
    for bad in ("{", "[1]"):
        call["function"] = {"name": "get_weather", "arguments": bad}
        refused = server.post(CHAT, chat_body(messages=messages, tools=[WEATHER]))
        assert_error(refused, 400, param="messages[1].tool_calls[0].function.arguments")


def test_a_model_that_knows_no_tools_says_so(server: Running) -> None:
    message = assert_error(server.post(CHAT, chat_body(tools=[ADD])), 400, param="tools", code="unsupported_parameter")
    assert "knows no tools" in message
    assert server.post(CHAT, chat_body(tools=[ADD], tool_choice="none")).status_code == 200
    speak(server, UNKNOWN_CALLS, "fine")
    message = assert_error(server.post(CHAT, chat_body(tools=[ADD])), 400, param="tools", code="unsupported_parameter")
    assert "Hermes" in message


def function(**parameters: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", "parameters": parameters}}]


DEEP: dict[str, Any] = {}
for _ in range(17):
    DEEP = {"properties": {"x": DEEP}}


@pytest.mark.parametrize(
    ("bad", "param"),
    [
        ({"tools": [ADD, ADD]}, "tools[1].function.name"),
        ({"tools": function(type="array")}, "tools[0].function.parameters"),
        ({"tools": function(type="object", properties={"a": {"type": "strnig"}})}, "tools[0].function.parameters"),
        ({"tools": function(properties={"a": {"type": ["string", 5]}})}, "tools[0].function.parameters"),
        ({"tools": function(properties={"a": {"anyOf": [{"type": 5}]}})}, "tools[0].function.parameters"),
        ({"tools": function(properties={"a": {"pattern": "x" * 5000}})}, "tools[0].function.parameters"),
        ({"tools": function(**DEEP)}, "tools[0].function.parameters"),
        ({"tools": function(enum=["x" * 70000])}, "tools[0].function.parameters"),
        ({"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [], "tool_choice": {"type": "function", "function": {"name": "add"}}}, "tool_choice"),
        ({"tools": function(**{"$ref": "#/$defs/nobody"}), "tool_choice": "required"}, "tools"),
    ],
)
def test_bad_tools(server: Running, bad: dict[str, Any], param: str) -> None:
    speak(server, HERMES, "fine")
    assert_error(server.post(CHAT, chat_body(**bad)), 400, param=param)


def test_names_of_properties_are_no_keywords(server: Running) -> None:
    speak(server, HERMES, "fine")
    ask(server, tools=function(properties={"type": {"type": "string"}, "pattern": {"enum": ["((("]}}))


# Thoughts


THOUGHTS = "<think>\nWell.\n\nSo.\n</think>\n\nYes."


def test_thoughts_are_apart_from_the_answer(server: Running) -> None:
    speak(server, HERMES, THOUGHTS)
    message = ask(server)["message"]
    assert message["reasoning_content"] == message["reasoning"] == "Well.\n\nSo."
    assert message["content"] == "Yes."
    assert ask(server, include_reasoning=False)["message"] == {"role": "assistant", "content": "Yes.", "refusal": None}


def test_a_prompt_that_has_thought_already(server: Running) -> None:
    speak(server, HERMES, "No </think> here.")
    message = ask(server, chat_template_kwargs={"enable_thinking": False})["message"]
    assert message["content"] == "No </think> here."
    assert message["reasoning_content"] is None


def test_an_effort_goes_to_a_template_that_knows_it(server: Running) -> None:
    speak(server, HERMES + "{{ reasoning_effort }}", "fine")
    for effort in ("none", "minimal", "high"):
        ask(server, reasoning_effort=effort)
        assert server.engine.prepared[-1].prompt.endswith(effort)
    ask(server, reasoning_effort="high", chat_template_kwargs={"reasoning_effort": "my own"})
    assert server.engine.prepared[-1].prompt.endswith("my own")
    asked = {"messages": chat_body()["messages"], "reasoning_effort": "low"}
    assert server.post("/tokenize", asked).status_code == 200
    assert_error(server.post("/tokenize", {"prompt": "hi", "reasoning_effort": "low"}), 400, param="reasoning_effort")


def test_a_template_that_can_only_be_told_whether_to_think(server: Running) -> None:
    speak(server, HERMES, "fine")
    ask(server, reasoning_effort="none")
    assert server.engine.prepared[-1].prompt.endswith("</think>\n\n")
    ask(server, reasoning_effort="medium")
    assert "think" not in server.engine.prepared[-1].prompt
    for effort in ("low", "high", "max"):
        said = assert_error(server.post(CHAT, chat_body(reasoning_effort=effort)), 400, param="reasoning_effort")
        assert effort in said


def test_a_model_that_does_not_think_makes_no_effort(server: Running) -> None:
    """What has no template variable for it asks for nothing with "none", and for what is not there with more."""
    ask(server, reasoning_effort="none")
    assert_error(server.post(CHAT, chat_body(reasoning_effort="medium")), 400, param="reasoning_effort")


def test_a_prompt_that_ends_in_thoughts(server: Running) -> None:
    speak(server, HERMES + "<think>\n", "Well.</think>Yes.")
    message = ask(server)["message"]
    assert (message["reasoning_content"], message["content"]) == ("Well.", "Yes.")


def test_a_call_after_thoughts(server: Running) -> None:
    speak(server, HERMES, f"{THOUGHTS}\n" + '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>')
    found = ask(server, tools=[ADD], tool_choice="required")
    assert found["message"]["reasoning_content"] == "Well.\n\nSo."
    assert found["message"]["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'
    assert "thoughts" in server.engine.grammars[-1].lead


def test_log_probabilities_cover_every_token_of_an_answer_in_parts(server: Running) -> None:
    speak(server, HERMES, THOUGHTS)
    body = chat_body(max_tokens=200, logprobs=True)
    whole = server.post(CHAT, body).json()["choices"][0]["logprobs"]["content"]
    streamed = [
        entry
        for event in events(server.post(CHAT, {**body, "stream": True}))[:-1]
        for entry in (event["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == whole
    assert "".join(entry["token"] for entry in whole) == THOUGHTS


# Forms


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FORMS: list[dict[str, Any]] = [
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}},
    {"structured_outputs": {"json": SCHEMA}},
    {"structured_outputs": {"json": json.dumps(SCHEMA)}},
    {"structured_outputs": {"regex": "[a-z]+"}},
    {"structured_outputs": {"choice": ["a", "b"]}},
    {"structured_outputs": {"grammar": 'root ::= "a"'}},
    {"structured_outputs": {"json_object": True}},
    {"guided_json": SCHEMA},
    {"guided_regex": "[a-z]+"},
    {"guided_choice": ["a", "b"]},
    {"guided_grammar": 'start: "a"'},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("route", [CHAT, TEXT])
def test_every_field_that_asks_for_a_form_makes_a_grammar(server: Running, form: dict[str, Any], route: str) -> None:
    body = chat_body(**form) if route == CHAT else text_body(**form)
    assert server.post(route, body).status_code == 200
    assert len(server.engine.grammars) == 1


def test_text_is_no_form(server: Running) -> None:
    assert server.post(CHAT, chat_body(response_format={"type": "text"})).status_code == 200
    assert not server.engine.grammars


def schema_form(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}}


BAD_FORMS: list[tuple[dict[str, Any], str]] = [
    ({"guided_json": SCHEMA, "guided_regex": "a"}, "guided_regex"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "((("}}, "structured_outputs"),
    ({"guided_regex": "((("}, "guided_regex"),
    ({"guided_regex": "a" * 5000}, "guided_regex"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_grammar": "start: nobody"}, "guided_grammar"),
    ({"guided_json": "{"}, "guided_json"),
    (schema_form({"type": "strnig"}), "response_format"),
    (schema_form({"$ref": "#"}), "response_format"),
    (schema_form({"$ref": "http://169.254.169.254/"}), "response_format"),
    (schema_form(DEEP), "response_format"),
    (schema_form({"enum": ["x" * 70000]}), "response_format"),
]


@pytest.mark.parametrize(("bad", "param"), BAD_FORMS, ids=lambda value: str(value)[:60])
@pytest.mark.parametrize("route", [CHAT, TEXT])
def test_a_bad_form_is_refused_and_the_next_request_is_not(
    server: Running, bad: dict[str, Any], param: str, route: str
) -> None:
    good = chat_body(guided_regex="[a-z]+") if route == CHAT else text_body(guided_regex="[a-z]+")
    assert server.post(route, good).status_code == 200
    bad_body = chat_body(**bad) if route == CHAT else text_body(**bad)
    assert_error(server.post(route, bad_body), 400, param=param)
    assert_error(server.post(route, {**bad_body, "stream": True}), 400, param=param)
    assert server.post(route, good).status_code == 200
