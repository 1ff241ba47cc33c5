"""Parsing answers: each dialect, whatever is malformed, and any way of cutting the text."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qengine.serving.answer_parser import AnswerForm, AnswerParser
from qengine.serving.dialect import CallStyle, ReasoningTags, ToolDialect
from qengine.serving.pieces import Piece

NAMES = frozenset(("get_weather", "add"))
THINK = ReasoningTags("<think>", "</think>")
DIALECTS = {
    "hermes": ToolDialect(CallStyle.TAGGED, "<tool_call>", "</tool_call>"),
    "llama": ToolDialect(CallStyle.BARE, "<|python_tag|>", arguments_key="parameters"),
    "mistral": ToolDialect(CallStyle.LIST, "[TOOL_CALLS]"),
    "newer mistral": ToolDialect(CallStyle.NAMED, "[TOOL_CALLS]"),
}

Shown = tuple[str, str, list[tuple[str, str]]]


def shown(pieces: list[Piece]) -> Shown:
    """(thoughts, content, calls with their arguments)."""
    calls: list[tuple[str, str]] = []
    for piece in pieces:
        if piece.kind == "call":
            assert piece.call == len(calls)
            calls.append((piece.text, ""))
        elif piece.kind == "arguments":
            assert piece.call == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + piece.text)
    thoughts, content = ("".join(p.text for p in pieces if p.kind == kind) for kind in ("reasoning", "content"))
    return thoughts, content, calls


def parse(text: str, dialect: str | None = None, *, cuts: tuple[int, ...] = (), **more: object) -> Shown:
    form = AnswerForm(dialect=DIALECTS[dialect] if dialect else None, names=NAMES, **more)  # type: ignore[arg-type]
    parser = AnswerParser(form)
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    pieces = [p for start, end in itertools.pairwise(places) for p in parser.feed(text[start:end], is_last=False)]
    return shown([*pieces, *parser.feed("", is_last=True)])


ROME = '{"city": "Rome", "note": "a } and a \\" and [ é 🙂"}'
CALLS = [
    ("hermes", f'<tool_call>\n{{"name": "get_weather", "arguments": {ROME}}}\n</tool_call>'),
    ("hermes", f'<tool_call>{{"arguments":{ROME},"name":"get_weather"}}</tool_call>'),
    ("hermes", f'<tool_call>{{"id": 7, "name": "get_weather", "arguments": {ROME}, "more": [1, {{}}]}}'),
    ("llama", f'{{"name": "get_weather", "parameters": {ROME}}}'),
    ("llama", f'\n {{"type": "function", "name": "get_weather", "parameters": {ROME}}}'),
    ("llama", f'<|python_tag|>{{"name": "get_weather", "arguments": {ROME}}}'),
    ("mistral", f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {ROME}}}]'),
    ("mistral", f'[TOOL_CALLS] [ {{"name": "get_weather", "arguments": {ROME}, "id": "abc"}} ]'),
    ("mistral", f'[TOOL_CALLS]{{"name": "get_weather", "arguments": {ROME}}}'),
    ("newer mistral", f"[TOOL_CALLS]get_weather[ARGS]{ROME}"),
    ("newer mistral", f"[TOOL_CALLS]get_weather[CALL_ID]abcdefghi[ARGS]{ROME}"),
]


@pytest.mark.parametrize(("dialect", "text"), CALLS)
def test_one_call(dialect: str, text: str) -> None:
    assert parse(text, dialect) == ("", "", [("get_weather", ROME)])
    assert parse(f"<think>\nhm\n</think>\n\n{text}", dialect, tags=THINK) == ("hm", "", [("get_weather", ROME)])


SEVERAL = [
    ("hermes", '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n' * 2),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1}}' * 2),
    ("llama", '{"name": "add", "parameters": {"a": 1}}; {"name": "add", "parameters": {"a": 1}}'),
    ("llama", '{"name": "add", "parameters": {"a": 1}}\n{"name": "add", "parameters": {"a": 1}}'),
    ("mistral", '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}, {"name": "add", "arguments": {"a": 1}}]'),
    ("newer mistral", '[TOOL_CALLS]add[ARGS]{"a": 1}' * 2),
]


@pytest.mark.parametrize(("dialect", "text"), SEVERAL)
def test_several_calls_and_a_limit(dialect: str, text: str) -> None:
    call = ("add", '{"a": 1}')
    assert parse(text, dialect) == ("", "", [call, call])
    assert parse(text, dialect, max_calls=1) == ("", "", [call])


def test_content_around_calls() -> None:
    call = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
    assert parse(f"Let me see.\n{call}\n", "hermes") == ("", "Let me see.", [("add", "{}")])
    assert parse(f"One {call} two {call}", "hermes") == ("", "One two", [("add", "{}")] * 2)
    assert parse(f"a <tool b {call}", "hermes")[1] == "a <tool b"


def test_arguments_in_other_forms() -> None:
    text = '<tool_call>{"name": "add", "arguments": %s}</tool_call>'
    assert parse(text % json.dumps('{"a": 1}'), "hermes")[2] == [("add", '{"a": 1}')]
    assert parse('<tool_call>{"name": "add"}</tool_call>', "hermes")[2] == [("add", "{}")]
    assert parse(text % r'"{\"a\": \"\ud800\"}"', "hermes")[2] == [("add", '{"a": "\ufffd"}')]


MALFORMED = [
    ("hermes", "<tool_call>"),
    ("hermes", "<tool_call>\n</tool_call>"),
    ("hermes", "<tool_call>add(1, 2)</tool_call>"),
    ("hermes", '<tool_call>{"name": "nobody", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": 5, "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "add", "arguments": 5}</tool_call>'),
    ("hermes", '<tool_call>{"name" "add"}</tool_call>'),
    ("hermes", '<tool_call>{"name": "add", "name": "add", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": {"a": 1}}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": {"a": 1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "add"'),
    ("hermes", '<tool_call>{"na\\uZZZZme": "add"}</tool_call>'),
    ("hermes", "<tool_cal"),
    ("hermes", "  blanks stay  "),
    ("llama", "plain text with {braces}"),
    ("llama", '{"city": "Rome"}'),
    ("llama", '{"name": "nobody", "parameters": {}}'),
    ("llama", "{1: 2}"),
    ("llama", "  "),
    ("mistral", "[TOOL_CALLS]"),
    ("mistral", "[TOOL_CALLS]add"),
    ("mistral", "[TOOL_CALLS][]"),
    ("newer mistral", "[TOOL_CALLS]nobody[ARGS]{}"),
    ("newer mistral", "[TOOL_CALLS]add[ARGS]5"),
    ("newer mistral", "[TOOL_CALLS]" + "x" * 200),
]


@pytest.mark.parametrize(("dialect", "text"), MALFORMED)
def test_what_is_no_call_is_content_to_the_last_character(dialect: str, text: str) -> None:
    assert parse(text, dialect) == ("", text, [])


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_great_many_blanks_are_kept_or_dropped(dialect: str) -> None:
    blanks = " \n" * 10_000
    assert parse(f"{blanks}a{blanks}b", dialect)[1] == f"{blanks}a{blanks}b"
    call = {"newer mistral": "[TOOL_CALLS]add[ARGS]{}", "mistral": '[TOOL_CALLS][{"name": "add"}'}
    text = call.get(dialect, '<tool_call>{"name": "add"}' if dialect == "hermes" else '{"name": "add"}')
    assert parse(f"{text}{blanks}", dialect) == ("", "", [("add", "{}")])


def test_a_valid_call_after_a_malformed_one_is_found() -> None:
    text = 'a <tool_call>junk <tool_call><tool_call>{"name": "add", "arguments": {}}</tool_call>'
    assert parse(text, "hermes") == ("", "a <tool_call>junk <tool_call>", [("add", "{}")])


def test_a_call_that_is_cut_short_stands() -> None:
    text = '<tool_call>{"name": "add", "arguments": {"a": [1, 2'
    assert parse(text, "hermes") == ("", "", [("add", '{"a": [1, 2')])


@pytest.mark.parametrize(
    ("text", "phase", "expected"),
    [
        ("<think>\nhm\n\nwell\n</think>\n\nyes ", None, ("hm\n\nwell", "yes ", [])),
        ("hm</think>yes", True, ("hm", "yes", [])),
        ("hm</think>yes", False, ("", "hm</think>yes", [])),
        ("\n<think></think>yes", None, ("", "yes", [])),
        ("<think>never closed </thin", None, ("never closed </thin", "", [])),
        ("<thought>no</thought>", None, ("", "<thought>no</thought>", [])),
        ("yes <think>not at the beginning</think>", None, ("", "yes <think>not at the beginning</think>", [])),
        ("<thi", None, ("", "<thi", [])),
        ("", None, ("", "", [])),
    ],
)
def test_reasoning(text: str, phase: bool | None, expected: Shown) -> None:
    assert parse(text, tags=THINK, phase=phase) == expected


BITS = st.sampled_from(
    [
        *(
            "<tool_call>",
            "</tool_call>",
            "[TOOL_CALLS]",
            "[ARGS]",
            "[CALL_ID]",
            "<|python_tag|>",
            "<think>",
            "</think>",
        ),
        *('{"name": "add", "arguments": ', '{"name": "add", "parameters": ', '"name"', '"add"', '"arguments"'),
        *("{", "}", "[", "]", ",", ":", ";", '"', "\\", " ", "\n", "add", "nobody", "1", "é🙂", "</", "<tool", "[TOOL"),
        *('{"a": 1}', '{"name": "add", "arguments": {"b": "x"}}'),
    ]
)
TEXTS = st.one_of(
    st.lists(BITS, max_size=25).map("".join), st.sampled_from([text for _, text in [*CALLS, *SEVERAL, *MALFORMED]])
)


@settings(max_examples=600, deadline=None, derandomize=True)
@given(
    text=TEXTS,
    dialect=st.sampled_from([None, *DIALECTS]),
    cuts=st.lists(st.integers(0, 2000), max_size=8).map(tuple),
    tags=st.sampled_from([None, THINK]),
    max_calls=st.sampled_from([None, 1]),
)
def test_any_way_of_cutting_gives_the_same(
    text: str, dialect: str | None, cuts: tuple[int, ...], tags: ReasoningTags | None, max_calls: int | None
) -> None:
    whole = parse(text, dialect, tags=tags, max_calls=max_calls)
    assert parse(text, dialect, cuts=cuts, tags=tags, max_calls=max_calls) == whole
    assert parse(text, dialect, cuts=tuple(range(len(text))), tags=tags, max_calls=max_calls) == whole
    if not whole[2] and tags is None:
        assert whole[1] == text


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    arguments=st.dictionaries(
        st.text(max_size=5), st.recursive(st.none() | st.text() | st.integers(), st.lists), max_size=4
    ),
    indent=st.sampled_from([None, 2]),
    dialect=st.sampled_from([*DIALECTS]),
)
def test_any_json_object_comes_through_as_arguments(
    arguments: dict[str, object], indent: int | None, dialect: str
) -> None:
    written = json.dumps(arguments, indent=indent, ensure_ascii=False)
    forms = {
        "hermes": f'<tool_call>{{"name": "add", "arguments": {written}}}</tool_call>',
        "llama": f'{{"name": "add", "parameters": {written}}}',
        "mistral": f'[TOOL_CALLS][{{"name": "add", "arguments": {written}}}]',
        "newer mistral": f"[TOOL_CALLS]add[ARGS]{written}",
    }
    assert parse(forms[dialect], dialect) == ("", "", [("add", written)])
