"""What a request may hold: types, bounds, unsupported fields, and bodies that are not JSON objects."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from qengine.serving.body import parse_json_object
from qengine.serving.embeddings import EmbeddingRequest
from qengine.serving.errors import ApiError
from qengine.serving.generation import sampling_params
from qengine.serving.limits import LIMITS
from qengine.serving.messages_protocol import CountTokensRequest, MessagesRequest
from qengine.serving.protocol import ChatCompletionRequest, CheckedRequest, CompletionRequest, parse_request
from qengine.serving.responses_protocol import ResponsesRequest
from qengine.serving.text_routes import DetokenizeRequest, TokenizeRequest

USER = {"role": "user", "content": "hi"}
INTEGERS = ["n", "seed", "max_tokens", "max_completion_tokens", "min_tokens", "top_k", "top_logprobs"]
NUMBERS = ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"]


def chat(**more: Any) -> ChatCompletionRequest:
    return parse_request(ChatCompletionRequest, {"model": "m", "messages": [USER], **more})


def text(**more: Any) -> CompletionRequest:
    return parse_request(CompletionRequest, {"model": "m", "prompt": "hi", **more})


def refusal(kind: Any, **more: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        kind(**more)
    assert caught.value.status == 400
    assert len(str(caught.value)) < 1000
    return caught.value


BAD_FIELDS = [
    *({"max_tokens": value} for value in (0, -1, 2**63, "10", 1.5, True)),
    *({"max_completion_tokens": value} for value in (0, "10")),
    *({"temperature": value} for value in (-0.1, 2.1, "hot", True, [])),
    *({"top_p": value} for value in (0, -1, 1.0001, "1")),
    *({"top_k": value} for value in (-2, 10**9, 1.5, True)),
    *({"min_p": value} for value in (-0.1, 2)),
    *({"presence_penalty": value} for value in (-2.01, 2.01)),
    *({"frequency_penalty": value} for value in (-2.01, 2.01)),
    *({"repetition_penalty": value} for value in (0, -1, 1e-320, 0.009, 101)),
    *({"seed": value} for value in (-1, 2**64, "a", 1.0)),
    *({"n": value} for value in (0, -1, 9, 10**9, True, "2")),
    *({"stop": value} for value in (["a"] * 9, [""], "", "x" * 2**20, [1], 5)),
    *({"stop_token_ids": value} for value in ([-1], ["a"], [True], 5, [2**40])),
    *({"logit_bias": value} for value in ({"5": 101}, {"a": 1}, {"-1": 1}, {"5": "1"}, [1], {"\u0665": 1})),
    {"logit_bias": {str(index): 1 for index in range(1025)}},
    *({"allowed_token_ids": value} for value in ([], [-1], "a")),
    *({"model": value} for value in (None, 5, "", "x" * 2**20)),
    *({"stream": value} for value in ("yes", 1)),
    {"stream_options": {"include_usage": True}},
    {"stream": True, "stream_options": {"include_usage": 1}},
    *({"cache_salt": value} for value in ("", "x" * 129, "a b", "a\n", "a/b", 5)),
    *({"ignore_eos": value} for value in (1, "true")),
]


@pytest.mark.parametrize("kind", [chat, text])
@pytest.mark.parametrize("bad", BAD_FIELDS, ids=lambda bad: str(bad)[:40])
def test_bad_values_are_refused_with_the_fields_name(kind: Any, bad: dict[str, Any]) -> None:
    if kind is text and "max_completion_tokens" in bad:
        return  # Chat only: an unknown field here, and ignored.
    param = refusal(kind, **bad).param
    assert param is not None
    assert param.split("[")[0].split(".")[0] in bad


@pytest.mark.parametrize(
    "bad",
    [
        *({"messages": value} for value in ([], None, {}, [USER] * 100_000, ["x"], [[USER]])),
        *({"messages": [value]} for value in ({"content": "x"}, {"role": "root", "content": "x"}, {"role": "user"})),
        *({"messages": [{"role": "user", "content": value}]} for value in (5, None, {}, [5], [{"type": "text"}])),
        *(
            {"messages": [{"role": "user", "content": [{"type": kind, kind: {"url": "http://169.254.169.254/"}}]}]}
            for kind in ("image_url", "file", "input_audio")
        ),
        {"top_logprobs": 2},
        {"logprobs": 2},
        {"logprobs": True, "top_logprobs": -1},
        {"add_generation_prompt": True, "continue_final_message": True},
        {"max_tokens": 5, "max_completion_tokens": 6},
    ],
    ids=lambda bad: str(bad)[:60],
)
def test_bad_chat_fields(bad: dict[str, Any]) -> None:
    refusal(chat, **bad)


@pytest.mark.parametrize(
    "prompt", ["", [], [[]], [-1], [1.5], [True], [""], [["a"]], ["a", 5], None, 5, {}, ["a"] * 1000]
)
def test_bad_prompts(prompt: Any) -> None:
    assert refusal(text, prompt=prompt).param == "prompt"


@pytest.mark.parametrize(
    "bad",
    [
        *({"best_of": 2}, {"best_of": 3, "n": 2}, {"suffix": "x"}, {"logprobs": True}, {"logprobs": -1}),
        {"reasoning_effort": "high"},
    ],
)
def test_bad_completion_fields(bad: dict[str, Any]) -> None:
    refusal(text, **bad)


@pytest.mark.parametrize("best_of", [1, 2, None])
def test_best_of_that_asks_for_nothing(best_of: int | None) -> None:
    assert text(best_of=best_of, n=2).n == 2


UNSUPPORTED = [
    {"functions": [{"name": "f"}]},
    {"guided_whatever_comes": "x"},
    {"guided_whitespace_pattern": " "},
    {"prompt_embeds": "AAAA"},
    {"chat_template": "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"},
    {"mm_processor_kwargs": {}},
    {"audio": {"voice": "alloy"}},
    {"modalities": ["text", "audio"]},
    {"prompt_logprobs": 1},
    {"use_beam_search": True},
    {"logits_processors": ["x"]},
]


@pytest.mark.parametrize("bad", UNSUPPORTED, ids=lambda bad: str(bad)[:60])
def test_fields_that_would_change_the_answer_are_refused(bad: dict[str, Any]) -> None:
    for kind in (chat, text):
        assert refusal(kind, **bad).code == "unsupported_parameter"


def test_fields_that_ask_for_nothing_are_accepted() -> None:
    neutral = {
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "audio": None,
        "suffix": None,
        "user": "someone",
        "metadata": {"a": 1},
        "store": True,
        "service_tier": "auto",
        "an_unknown_field": [1, 2],
        **dict.fromkeys(["n", "seed", "max_tokens", "stop", "temperature", "logit_bias", "stream", "stream_options"]),
    }
    assert chat(**neutral).n is None
    assert text(**neutral).n is None
    assert chat(guided_decoding_backend="any").messages[0].content == "hi"


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("bad", "param"),
    [
        ({"response_format": "text"}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}},
            "response_format.json_schema.schema",
        ),
        ({"structured_outputs": {"choice": "a"}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a"], "whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        ({"guided_json": 5}, "guided_json"),
        ({"guided_regex": ["a"]}, "guided_regex"),
    ],
)
def test_bad_forms(bad: dict[str, Any], param: str) -> None:
    for kind in (chat, text):
        assert refusal(kind, **bad).param == param


@pytest.mark.parametrize(
    ("bad", "param"),
    [
        ({"tools": [TOOL] * 129}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "x" * 65}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": 'a"b'}}]}, "tools[0].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
            "tools[0].function.parameters",
        ),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": 1}}]}, "tools[0].function.strict"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"parallel_tool_calls": "yes"}, "parallel_tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls[0].function"),
    ],
)
def test_bad_tools(bad: dict[str, Any], param: str) -> None:
    assert refusal(chat, **bad).param == param


def test_completions_know_no_tools() -> None:
    assert refusal(text, tools=[TOOL]).param == "tools"


def test_good_values_arrive() -> None:
    request = chat(stop="x", logit_bias={"5": -100}, temperature=0, top_k=-1, max_completion_tokens=7, max_tokens=7)
    assert request.stop == ["x"]
    assert request.logit_bias == {5: -100.0}
    assert request.token_limit == 7
    assert chat(messages=[{"role": "assistant", "tool_calls": [CALL], "content": None}]).messages[0].content is None


def test_prompts_in_every_form() -> None:
    assert text(prompt="a").prompts == ["a"]
    assert text(prompt=["a", "b"]).prompts == ["a", "b"]
    assert text(prompt=[1, 2]).prompts == [[1, 2]]
    assert text(prompt=[[1, 2], "a", [3]]).prompts == [[1, 2], "a", [3]]


def test_the_requests_sampling_goes_before_the_models() -> None:
    defaults = {"temperature": 0.6, "top_p": 0.9, "top_k": 20}
    params = sampling_params(chat(temperature=0, top_p=None, stop="x", n=2), defaults, max_tokens=None)
    assert (params.temperature, params.top_p, params.top_k) == (0.0, 0.9, 20)
    assert params.stop_strings == ("x",)
    assert (params.n, params.max_tokens) == (2, None)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(
    name=st.sampled_from([*INTEGERS, *NUMBERS, "stop", "logit_bias", "messages", "stream_options", "stop_token_ids"]),
    value=st.one_of(
        st.sampled_from([-1, -(2**31), 2**31, 2**63, 2**64, 1e308, -1e308, 1e-320]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
            max_leaves=6,
        ),
    ),
)
def test_any_value_gives_a_request_within_bounds_or_a_400(name: str, value: Any) -> None:
    body = {"model": "m", "messages": [USER], "logprobs": True, "stream": True, name: value}
    refusals: list[ApiError] = []
    try:
        request = parse_request(ChatCompletionRequest, body)
    except ApiError as error:
        refusals.append(error)
    for refused in refusals:
        assert refused.status == 400
        json.dumps(refused.body(), allow_nan=False)
        return
    if name in INTEGERS and name != "top_logprobs":
        number = getattr(request, name)
        assert number is None or -1 <= number <= 2**63 - 1
    sampling_params(request, {}, max_tokens=None, min_tokens=0)


# Bodies


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"5",
        b"true",
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": "\xff"}',
        b'{"a": "\\ud800"}',
        b'{"a": "\\udc00x"}',
        b'{"\\ud800": 1}',
        b'{"a": ["\\u0000"]}',
        b'{"a": "\x00"}',
        b'{"a": ' + b"[" * 65 + b"]" * 65 + b"}",
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"{" + b",".join(b'"k%d": 1' % index for index in range(LIMITS.json_keys + 1)) + b"}",
        b"\xef\xbb\xbf{}",
    ],
    ids=lambda body: str(body[:30]),
)
def test_bodies_that_are_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_json_object(body)
    assert caught.value.status == 400


def test_bodies_that_are_fine() -> None:
    assert parse_json_object(b' {"a": "\\ud83d\\ude42", "b": [1, 2.5, null, true]} ') == {
        "a": "🙂",
        "b": [1, 2.5, None, True],
    }
    nested = b'{"a": ' + b"[" * 63 + b"]" * 63 + b"}"
    assert "a" in parse_json_object(nested)


def test_a_body_of_very_many_items_is_refused_before_it_is_parsed() -> None:
    at_limit = b'{"a": [' + b"1," * LIMITS.json_items + b"0]}"
    assert len(parse_json_object(at_limit)["a"]) == LIMITS.json_items + 1
    with pytest.raises(ApiError, match="items"):
        parse_json_object(at_limit.replace(b"0]", b"1,0]"))


def test_a_body_of_one_long_string_is_fine() -> None:
    body = json.dumps({"a": "x" * (LIMITS.body_bytes - 20)}).encode()
    assert len(parse_json_object(body)["a"]) == LIMITS.body_bytes - 20


REQUESTS = (
    *(ChatCompletionRequest, CompletionRequest, ResponsesRequest, MessagesRequest, CountTokensRequest),
    *(EmbeddingRequest, TokenizeRequest, DetokenizeRequest),
)


def parts_of(schema: Any) -> Iterator[dict[str, Any]]:
    """Every part of a validator's schema, without what is there for documentation."""
    if isinstance(schema, dict):
        yield schema
        schema = [part for name, part in schema.items() if name not in ("json_schema_input_schema", "metadata")]
    if isinstance(schema, list | tuple):
        for part in schema:
            yield from parts_of(part)


@pytest.mark.parametrize("kind", REQUESTS)
def test_a_list_tells_its_first_wrong_item_alone(kind: type[CheckedRequest]) -> None:
    lists = [part for part in parts_of(kind.__pydantic_core_schema__) if part.get("type") == "list"]
    assert lists or kind is EmbeddingRequest
    checked = [part for part in lists if part.get("items_schema", {"type": "any"})["type"] != "any"]
    assert [part["items_schema"] for part in checked if not part.get("fail_fast")] == []


def test_a_thousand_wrong_items_are_one_error() -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": [1] * 1000}]}
    with pytest.raises(ValidationError) as caught:
        ChatCompletionRequest.model_validate(body)
    assert caught.value.error_count() == 2  # It is no text, and its first part is none.
    with pytest.raises(ApiError, match=r"^messages\[0\].content\[0\] is 1, expected an object$"):
        parse_request(ChatCompletionRequest, body)
