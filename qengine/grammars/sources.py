"""What a client asks an answer to look like, checked and brought into one form.

Invariant: a source is text within the limits below, and equal sources mean the same grammar, so a source is its own key
in a cache. Whether the text is a valid grammar is the compiler's to find out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qengine.errors import RequestError
from qengine.request import StructuredOutputs

MAX_SCHEMA_BYTES = 64 * 1024
MAX_SCHEMA_DEPTH = 32
MAX_REGEX_BYTES = 4 * 1024
MAX_GRAMMAR_BYTES = 64 * 1024
MAX_CHOICES = 1024

Kind = Literal["json_schema", "regex", "lark", "context_free"]


@dataclass(frozen=True, slots=True)
class GrammarSource:
    """A grammar as text.

    Attributes:
        kind: what `text` is: a JSON schema, a regular expression, a grammar in Lark's syntax, or one whose syntax is
            still to be found out (Lark or GBNF).
        text: the grammar.
        lead: Lark rules for what may come before it, of which the rule "lead" is the whole; empty for nothing.
    """

    kind: Kind
    text: str
    lead: str = ""

    @property
    def num_bytes(self) -> int:
        return len(self.text.encode()) + len(self.lead.encode())


def source_of(wanted: StructuredOutputs) -> GrammarSource:
    """The grammar that a request asks for.

    Raises:
        RequestError: it is too large, too deep, or of the wrong type.
    """
    if wanted.json is not None:
        return GrammarSource("json_schema", schema_text(wanted.json))
    if wanted.json_object:
        return GrammarSource("json_schema", '{"type":"object"}')
    if wanted.regex is not None:
        return GrammarSource("regex", _text(wanted.regex, "regex", MAX_REGEX_BYTES))
    if wanted.choice is not None:
        return GrammarSource("lark", _choice_grammar(wanted.choice))
    return GrammarSource("context_free", _text(wanted.grammar, "grammar", MAX_GRAMMAR_BYTES))


def schema_text(schema: str | Mapping[str, Any], name: str = "the JSON schema") -> str:
    """A JSON schema as compact text, its keys in the order given: they are written in that order.

    Raises:
        RequestError: it is no object, or beyond MAX_SCHEMA_BYTES or MAX_SCHEMA_DEPTH.
    """
    if isinstance(schema, str):
        schema = _parsed(_text(schema, name, MAX_SCHEMA_BYTES), name)
    if not isinstance(schema, Mapping):
        raise _refuse(f"{name} is a JSON {type(schema).__name__}, expected an object")
    _check_extent(schema, name)
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise _refuse(f"{name} is not JSON data: {error}") from error
    return _text(text, name, MAX_SCHEMA_BYTES)


def lark_string(text: str) -> str:
    """`text` as a string literal of Lark."""
    return json.dumps(text, ensure_ascii=False)


def _parsed(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _refuse(f"{name} is not JSON: {error}") from error


def _check_extent(schema: Mapping[str, Any], name: str) -> None:
    """Refuse what is too deep, or too large by far, at a cost that depends on the limits alone.

    Writing a schema of eight megabytes only to measure it would take a second.
    """
    num_chars = 0
    pending: list[tuple[int, Any]] = [(1, schema)]
    while pending:
        depth, item = pending.pop()
        if depth > MAX_SCHEMA_DEPTH:
            raise _refuse(f"{name} is nested more than {MAX_SCHEMA_DEPTH} levels deep; make it flatter")
        num_chars += 2 * len(item)  # Each has a character at least, and one beside it.
        inner: Sequence[Any] = item
        if isinstance(item, Mapping) and num_chars <= MAX_SCHEMA_BYTES:
            inner = [*item, *item.values()]
        for child in inner if num_chars <= MAX_SCHEMA_BYTES else ():
            if isinstance(child, str):
                num_chars += len(child)
            elif isinstance(child, Mapping | list | tuple):
                pending.append((depth + 1, child))
        if num_chars > MAX_SCHEMA_BYTES:
            raise _refuse(f"{name} has more than {MAX_SCHEMA_BYTES} bytes, expected at most that many; make it smaller")


def _text(value: Any, name: str, limit: int) -> str:
    if not isinstance(value, str) or not value:
        raise _refuse(f"{name} is {'empty' if value == '' else type(value).__name__}, expected text")
    try:
        num_bytes = len(value.encode())
    except UnicodeEncodeError as error:
        raise _refuse(f"{name} is not Unicode text: {error.reason}") from error
    if num_bytes > limit:
        raise _refuse(f"{name} has {num_bytes} bytes, expected at most {limit}")
    return value


def _choice_grammar(choices: Sequence[str]) -> str:
    if isinstance(choices, str) or not isinstance(choices, Sequence) or not 0 < len(choices) <= MAX_CHOICES:
        raise _refuse(f"choice is {str(choices)[:80]!r}, expected a list of 1 to {MAX_CHOICES} strings")
    texts = [lark_string(_text(choice, "each choice", MAX_GRAMMAR_BYTES)) for choice in choices]
    return _text("start: " + " | ".join(texts), "choice", MAX_GRAMMAR_BYTES)


def _refuse(message: str) -> RequestError:
    return RequestError(message, param="structured_outputs", code="invalid_grammar")
