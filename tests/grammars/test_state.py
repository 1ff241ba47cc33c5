"""Following a grammar: whatever walk the masks allow ends in a text that an independent judge accepts."""

from __future__ import annotations

import json
import re
from collections import deque
from typing import Any

import jsonschema
import pytest

from qengine.errors import GrammarError
from qengine.grammars.compiler import GrammarCompiler
from qengine.grammars.sources import GrammarSource, source_of
from qengine.request import StructuredOutputs
from qengine.tokenizer import Tokenizer
from tests.grammars.schemas import ENDLESS, SCHEMAS
from tests.grammars.walking import allowed_ids, walk


@pytest.mark.parametrize("schema", [*SCHEMAS.values(), *ENDLESS.values()], ids=[*SCHEMAS, *ENDLESS])
def test_json_of_a_schema_validates(compiler: GrammarCompiler, tokenizer: Tokenizer, schema: dict[str, Any]) -> None:
    compiled = compiler.compile(source_of(StructuredOutputs(json=schema)))
    check = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    for seed in range(3):
        check.validate(json.loads(walk(compiled.start(), tokenizer, seed)))


@pytest.mark.parametrize("regex", ["[a-z]{3}-[0-9]{2,5}", "(yes|no|maybe)!*", "[^x]{4}", "é🙂[äöü]{2}"])
def test_text_of_a_regex_matches(compiler: GrammarCompiler, tokenizer: Tokenizer, regex: str) -> None:
    compiled = compiler.compile(source_of(StructuredOutputs(regex=regex)))
    for seed in range(5):
        assert re.fullmatch(regex, walk(compiled.start(), tokenizer, seed))


def test_each_choice_can_be_made_and_nothing_else(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    choices = ["red", "reddish", 'qu"ote', "back\\slash", "tab\tand\nline", "é🙂", "a/b", "%llguidance {}"]
    compiled = compiler.compile(source_of(StructuredOutputs(choice=choices)))
    assert {walk(compiled.start(), tokenizer, seed) for seed in range(60)} <= set(choices)
    for choice in choices:
        state = compiled.start()
        for token_id in tokenizer.encode(choice, add_special_tokens=False):
            assert token_id in allowed_ids(state), choice
            # By brute force: every token allowed is a way on to some choice.
            state.accept(token_id)
        assert min(tokenizer.eos_token_ids) in allowed_ids(state)


def test_the_first_tokens_of_choices_by_brute_force(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    choices = ["alpha", "beta", "almost"]
    state = compiler.compile(source_of(StructuredOutputs(choice=choices))).start()
    spelled = {token_id: tokenizer.token_bytes(token_id) for token_id in range(2048)}
    possible = {
        token_id
        for token_id, data in spelled.items()
        if data and token_id not in tokenizer.special_token_ids and any(c.encode().startswith(data) for c in choices)
    }
    assert set(allowed_ids(state)) == possible


@pytest.mark.parametrize("grammar", ['start: "a" "b"+', 'root ::= "a" "b"+'])
def test_both_syntaxes_of_grammars(compiler: GrammarCompiler, tokenizer: Tokenizer, grammar: str) -> None:
    compiled = compiler.compile(source_of(StructuredOutputs(grammar=grammar)))
    assert re.fullmatch("ab+", walk(compiled.start(), tokenizer, 0))


def test_any_object(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    compiled = compiler.compile(source_of(StructuredOutputs(json_object=True)))
    state = compiled.start()
    for token_id in tokenizer.encode('{"a": [1, null, {"b": "c"}]}', add_special_tokens=False):
        state.accept(token_id)
    assert set(allowed_ids(state)) & tokenizer.eos_token_ids


def test_blanks_are_bounded(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    compiled = compiler.compile(source_of(StructuredOutputs(json_object=True)))
    for text, is_allowed in [('{\n  "a": 1\n}', True), ('{"a":1}', True), ('{  "a":1}', False), ('{\n\n"a":1}', False)]:
        state = compiled.start()
        try:
            for token_id in tokenizer.encode(text, add_special_tokens=False):
                state.accept(token_id)
        except GrammarError:
            assert not is_allowed, text
        else:
            assert is_allowed, text


def test_keys_come_in_the_order_of_the_schema(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    wanted: dict[str, Any] = {"properties": {"z": {"const": 1}, "a": {"const": 2}}, "required": ["z", "a"]}
    compiled = compiler.compile(source_of(StructuredOutputs(json={"type": "object", **wanted})))
    assert list(json.loads(walk(compiled.start(), tokenizer, 1)))[:2] == ["z", "a"]


def test_states_are_independent(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    compiled = compiler.compile(GrammarSource("regex", "[ab]{4}"))
    first, second = compiled.start(), compiled.start()
    begin = second.allowed
    first.accept(allowed_ids(first)[0])
    assert second.allowed == begin
    assert walk(second, tokenizer, 3)


def test_no_end_before_min_tokens_unless_nothing_else_is_left(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    ends = tokenizer.eos_token_ids
    (letter,) = tokenizer.encode("a", add_special_tokens=False)
    state = compiler.compile(GrammarSource("regex", "a{0,3}")).start(min_tokens=2)
    seen = []
    while not state.is_complete:
        found = allowed_ids(state)
        seen.append(bool(ends & set(found)))
        state.accept(letter if letter in found else min(ends))
    assert seen[:3] == [False, False, True]
    stopped = compiler.compile(GrammarSource("regex", "a|b")).start(min_tokens=9, stop_token_ids=frozenset({letter}))
    assert letter not in allowed_ids(stopped)
    stopped.accept(*tokenizer.encode("b", add_special_tokens=False))
    assert set(allowed_ids(stopped)) == ends  # The grammar leaves nothing else.


def test_a_token_that_is_not_allowed_is_an_error_of_this_state_alone(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    compiled = compiler.compile(GrammarSource("regex", "[ab]{4}"))
    state = compiled.start()
    wrong = next(i for i in range(2048) if i not in allowed_ids(state) and i not in tokenizer.eos_token_ids)
    with pytest.raises(GrammarError, match="does not go on"):
        state.accept(wrong)
    with pytest.raises(GrammarError):
        compiled.start().accept(min(tokenizer.eos_token_ids))
    assert walk(compiled.start(), tokenizer, 0)


def test_after_the_end_nothing_is_accepted(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    state = compiler.compile(GrammarSource("regex", "a")).start()
    walk(state, tokenizer, 0)
    with pytest.raises(GrammarError, match="ended"):
        state.accept(5)


def test_a_step_that_costs_too_much_is_an_error(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    compiled = compiler.compile(GrammarSource("regex", "((a{1,99}){1,99}){1,99}"))
    state = compiled.start()
    letters = tokenizer.encode("a", add_special_tokens=False) * 500
    with pytest.raises(GrammarError, match="does not go on"):
        deque(map(state.accept, letters), maxlen=0)
