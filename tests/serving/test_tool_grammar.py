"""Grammars for tool calls: whatever they allow is read back as calls with arguments that validate."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from qengine.errors import GrammarError
from qengine.grammars.compiler import GrammarCompiler
from qengine.grammars.state import GrammarState
from qengine.serving.answer_parser import AnswerForm, AnswerParser
from qengine.serving.dialect import CallStyle, ReasoningTags, ToolDialect, reasoning_tags, tool_dialect
from qengine.serving.reasoning import reasoning_phase
from qengine.serving.tool_grammar import CallableTool, ToolGrammar, reasoning_lead
from qengine.tokenizer import Tokenizer
from tests.grammars.conftest import compiler, tokenizer, vocabulary
from tests.grammars.walking import allowed_ids, walk
from tests.serving.chat_templates import HERMES, LLAMA, MISTRAL, UNKNOWN_CALLS
from tests.serving.test_answer_parser import DIALECTS, Shown, shown

__all__ = ["compiler", "tokenizer", "vocabulary"]

TOOLS = [
    CallableTool(
        "get_weather",
        {
            "$defs": {"city": {"enum": ["Rome", "Oslo"]}},
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}},
            "required": ["city"],
            "additionalProperties": False,
        },
        is_strict=True,
    ),
    # What the library cannot enforce is no reason to refuse a tool that is not strict.
    CallableTool(
        "add",
        {
            "type": "object",
            "properties": {"a": {"enum": [1, 2]}},
            "required": ["a"],
            "additionalProperties": False,
            "uniqueItems": True,
        },
        is_strict=False,
    ),
]
SCHEMAS = {tool.name: tool.parameters for tool in TOOLS}
THINK = ReasoningTags("<think>", "</think>")


def no_special(text: str) -> int | None:
    return None


def read(text: str, dialect: ToolDialect, **more: Any) -> Shown:
    parser = AnswerParser(AnswerForm(dialect=dialect, names=frozenset(SCHEMAS), **more))
    return shown(parser.feed(text, is_last=True))


def check(calls: list[tuple[str, str]]) -> None:
    for name, arguments in calls:
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])


def write(state: GrammarState, tokenizer: Tokenizer, text: str) -> None:
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        state.accept(token_id)


@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.parametrize("lead", ["", reasoning_lead(THINK, None, no_special)], ids=["", "reasoning"])
def test_a_forced_call_is_one(compiler: GrammarCompiler, tokenizer: Tokenizer, name: str, lead: str) -> None:
    grammar = ToolGrammar(DIALECTS[name], no_special)
    compiled = compiler.compile(grammar.forced(TOOLS, is_parallel=False, lead=lead))
    seen = set()
    for seed in range(6):
        state = compiled.start()
        if lead:
            write(state, tokenizer, "<think>\nhm</think>\n\n")
        thoughts, content, calls = read(walk(state, tokenizer, seed), DIALECTS[name])
        assert (thoughts, content, len(calls)) == ("", "", 1)
        check(calls)
        seen.add(calls[0][0])
    assert seen == set(SCHEMAS)


CALL = {
    "hermes": '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>',
    "llama": '{"name": "add", "parameters": {"a": 1}}',
    "mistral": '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}]',
    "newer mistral": '[TOOL_CALLS]add[ARGS]{"a": 1}',
}
SECOND = {"hermes": "\n<", "llama": "; {", "newer mistral": "["}


@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.parametrize("is_parallel", [False, True])
def test_more_calls_only_if_they_are_wanted(
    compiler: GrammarCompiler, tokenizer: Tokenizer, name: str, is_parallel: bool
) -> None:
    source = ToolGrammar(DIALECTS[name], no_special).forced(TOOLS, is_parallel=is_parallel, lead="")
    state = compiler.compile(source).start()
    text = CALL[name][:-1] + ", " if name == "mistral" else CALL[name] + SECOND[name]
    try:
        write(state, tokenizer, text)
    except GrammarError:
        assert not is_parallel
    else:
        assert is_parallel


@pytest.mark.parametrize("name", DIALECTS)
def test_free_answers_are_text_or_calls_of_the_right_form(
    compiler: GrammarCompiler, tokenizer: Tokenizer, name: str
) -> None:
    source = ToolGrammar(DIALECTS[name], no_special).free(TOOLS, is_parallel=True, content=None, lead="")
    compiled = compiler.compile(source)
    ends = tokenizer.eos_token_ids
    for text in ("Just text, with [brackets] and <tags>.", CALL[name]):
        state = compiled.start()
        write(state, tokenizer, text)
        assert ends & set(allowed_ids(state)), text
    for wrong in ('"nobody"', '"get_weather", "arguments": {"city": "Paris"'):
        state = compiled.start()
        with pytest.raises(GrammarError):
            write(state, tokenizer, CALL[name].replace('"add"', wrong).replace("add[ARGS]", "nobody[ARGS]"))


def test_free_answers_may_be_json_of_a_schema_instead(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    source = ToolGrammar(DIALECTS["hermes"], no_special).free(TOOLS, is_parallel=True, content={"enum": [7]}, lead="")
    texts = {walk(compiler.compile(source).start(), tokenizer, seed) for seed in range(30)}
    assert "7" in texts
    for text in texts - {"7"}:
        check(read(text, DIALECTS["hermes"])[2])


def test_markers_that_are_special_tokens_are_named_by_their_ids(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    special = min(tokenizer.special_token_ids - tokenizer.eos_token_ids)
    spelled = tokenizer.token_text(special)
    dialect = ToolDialect(CallStyle.LIST, spelled)
    source = ToolGrammar(dialect, tokenizer.special_token_id).forced(TOOLS, is_parallel=False, lead="")
    state = compiler.compile(source).start()
    assert allowed_ids(state) == [special]
    _, content, calls = read(walk(state, tokenizer, 0), dialect)
    assert (content, len(calls)) == ("", 1)
    check(calls)


@pytest.mark.parametrize(
    ("phase", "text", "is_allowed"),
    [
        (None, "<think>hm</think>", True),
        (None, CALL["hermes"], True),
        (True, "hm</think>\n\n" + CALL["hermes"], True),
        (True, CALL["hermes"], True),  # These are its thoughts.
        (None, "hm</think>", False),
        (True, "hm</think>hm", False),
    ],
)
def test_thoughts_before_a_call(
    compiler: GrammarCompiler, tokenizer: Tokenizer, phase: bool | None, text: str, is_allowed: bool
) -> None:
    lead = reasoning_lead(THINK, phase, no_special)
    state = compiler.compile(
        ToolGrammar(DIALECTS["hermes"], no_special).forced(TOOLS, is_parallel=False, lead=lead)
    ).start()
    try:
        write(state, tokenizer, text)
    except GrammarError:
        assert not is_allowed
    else:
        assert is_allowed


def test_no_thoughts_need_no_rules() -> None:
    assert reasoning_lead(None, None, no_special) == reasoning_lead(THINK, False, no_special) == ""


def test_dialects_are_found_from_the_template() -> None:
    found = [tool_dialect(template) for template in (HERMES, LLAMA, MISTRAL, MISTRAL + "[ARGS]", UNKNOWN_CALLS, "")]
    styles = [None if dialect is None else dialect.style for dialect in found]
    assert styles == [CallStyle.TAGGED, CallStyle.BARE, CallStyle.LIST, CallStyle.NAMED, None, None]
    qwen_coder = "<tool_call>\n<function=f>\n<parameter=a>1</parameter>\n</function>\n</tool_call>"
    assert tool_dialect(qwen_coder) is None
    assert reasoning_tags(HERMES) == THINK
    assert reasoning_tags("[THINK]x[/THINK]") == ReasoningTags("[THINK]", "[/THINK]")
    assert reasoning_tags("plain") is None


def test_where_a_prompt_leaves_the_thoughts() -> None:
    prompts = ["...assistant\n", "...assistant\n<think>\n", "...<think>\n\n</think>\n\n"]
    assert [reasoning_phase(prompt, THINK) for prompt in prompts] == [None, True, False]
