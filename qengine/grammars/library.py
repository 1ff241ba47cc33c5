"""The grammar library (llguidance) with our settings: how a source is written for it, and what it may spend.

It compiles lazily: a grammar becomes a small parser at once, and the automaton grows as tokens come. Its own limits, in
counted operations, bound both. Invariant: a source makes the same grammar, or the same refusal, in every process.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import llguidance
from llguidance.gbnf_to_lark import any_to_lark

from qengine.errors import GrammarError
from qengine.grammars.sources import GrammarSource

#: A line break with an indentation, or one space. Without a bound a small model would write blanks for ever.
_WHITESPACE = r" |\n[ \t]{0,64}"
_MAX_MESSAGE_CHARS = 300


def new_limits() -> llguidance.LLParserLimits:
    """What compiling a grammar, and each step of it, may cost: worst seen: 0.4 s and, with twice the fuel, 0.1 s."""
    return llguidance.LLParserLimits(
        max_items_in_row=1000,
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=100_000,
        step_max_items=20_000,
        max_lexer_states=20_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )


def library_text(source: GrammarSource) -> str:
    """`source` as the library reads it.

    Raises:
        GrammarError: a GBNF grammar is malformed.
    """
    answer = _answer(source)
    if not source.lead:
        return json.dumps({"grammars": [answer]})
    lead = f"start: lead @answer\n{source.lead}\n"
    return json.dumps({"grammars": [{"name": "whole", "lark_grammar": lead}, {"name": "answer", **answer}]})


def _answer(source: GrammarSource) -> dict[str, Any]:
    if source.kind == "json_schema":
        return {"json_schema": _with_options(json.loads(source.text), is_lenient=False)}
    if source.kind == "regex":
        written: dict[str, Any] = json.loads(llguidance.LLMatcher.grammar_from_regex(source.text))["grammars"][0]
        return {"lark_grammar": written["lark_grammar"]}
    if source.kind == "lark":
        return {"lark_grammar": source.text}
    try:
        return {"lark_grammar": any_to_lark(source.text)}
    except Exception as error:  # the converter raises whatever its text makes it raise
        raise GrammarError(readable(str(error))) from error


def json_rule(schema: Mapping[str, Any], *, is_lenient: bool = False) -> str:
    """The right-hand side of a Lark rule for JSON of a schema.

    Args:
        is_lenient: leave out what the library cannot enforce, instead of refusing the schema.
    """
    return "%json " + json.dumps(_with_options(schema, is_lenient=is_lenient), ensure_ascii=False)


def _with_options(schema: Mapping[str, Any], *, is_lenient: bool) -> dict[str, Any]:
    # Whatever a schema itself says of the library's options counts for nothing.
    return {**schema, "x-guidance": {"whitespace_pattern": _WHITESPACE, "lenient": is_lenient}}


def readable(message: str) -> str:
    """A message of the library for clients: the first lines, without its internal marks."""
    lines = [line.strip() for line in message.replace("<non-verbose/>", "").splitlines()]
    text = " ".join(line for line in lines if line and not re.fullmatch(r"[\^~ ]+", line))
    return text if len(text) <= _MAX_MESSAGE_CHARS else text[:_MAX_MESSAGE_CHARS] + "..."


def new_matcher(tokenizer: llguidance.LLTokenizer, text: str) -> llguidance.LLMatcher:
    """A parser at the beginning of what `library_text` gave.

    Raises:
        GrammarError: the text is not a valid grammar, or is beyond the limits.
    """
    matcher = llguidance.LLMatcher(tokenizer, text, log_level=0, limits=new_limits())
    if matcher.is_error():
        raise GrammarError(readable(matcher.get_error()))
    return matcher
