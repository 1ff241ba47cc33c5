"""The grammar that makes a model call tools: as it was trained to write calls, with arguments of the tool's own schema.

Invariant: whatever the grammar allows is read back as calls by `tool_parser`. Text is Lark; special tokens are named by
their ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qengine.grammars.library import json_rule
from qengine.grammars.sources import GrammarSource, lark_string
from qengine.serving.dialect import CallStyle, ReasoningTags, ToolDialect

#: Anything but special tokens.
_TEXT = "TEXT: /(.|\\n)*/"

SpecialId = Callable[[str], int | None]


@dataclass(frozen=True, slots=True)
class CallableTool:
    """A tool: its name, the schema of its arguments, and whether all of the schema must be enforced."""

    name: str
    parameters: dict[str, Any]
    is_strict: bool


class ToolGrammar:
    """Writes grammars for one model.

    Args:
        dialect: how it calls.
        special_id: the id of a special token by its text.
    """

    def __init__(self, dialect: ToolDialect, special_id: SpecialId) -> None:
        self._dialect = dialect
        self._special_id = special_id

    def forced(self, tools: Sequence[CallableTool], *, is_parallel: bool, lead: str) -> GrammarSource:
        """One call, or several if `is_parallel`, and nothing else."""
        return _source([f"start: {self._calls(is_parallel)}", *self._call_rules(tools)], lead)

    def free(
        self, tools: Sequence[CallableTool], *, is_parallel: bool, content: dict[str, Any] | None, lead: str
    ) -> GrammarSource:
        """Calls of the right form where the model makes them, else content: JSON of the schema `content`, if given."""
        style, rules = self._dialect.style, list(self._call_rules(tools))
        if content is not None:
            start = [f"start: {self._calls(is_parallel)} | content", f"content: {json_rule(content)}"]
        elif style is CallStyle.BARE:
            start = [f"start: {self._calls(is_parallel)} | FREE", "FREE: /(\\s*[^\\s{](.|\\n)*)?/"]
        else:
            several = "*" if is_parallel and style is not CallStyle.LIST else "?"
            calls = self._list_body(is_parallel) if style is CallStyle.LIST else self._call_body()
            start = [f"start: opened_call{several} TEXT", f"opened_call: opened {calls}", _TEXT]
            start.append(_up_to("opened", self._dialect.opener, self._special_id))
        return _source([*start, *rules], lead)

    def _calls(self, is_parallel: bool) -> str:
        style = self._dialect.style
        if style is CallStyle.LIST:
            return f"{self._marker(self._dialect.opener)} {self._list_body(is_parallel)}"
        if not is_parallel:
            return "call"
        between = {CallStyle.TAGGED: '"\\n" ', CallStyle.BARE: '"; " '}.get(style, "")
        return f"call ({between}call)*"

    def _call_rules(self, tools: Sequence[CallableTool]) -> Iterator[str]:
        key = self._dialect.arguments_key
        if self._dialect.style is not CallStyle.LIST:
            opener = "" if self._dialect.style is CallStyle.BARE else self._marker(self._dialect.opener)
            yield f"call: {opener} {self._call_body()}"
        yield "body: " + " | ".join(f"body_{index}" for index in range(len(tools)))
        for index, tool in enumerate(tools):
            if self._dialect.style is CallStyle.NAMED:
                yield f"body_{index}: {lark_string(tool.name)} {self._marker('[ARGS]')} arguments_{index}"
            else:
                head = lark_string(f'{{"name": "{tool.name}", "{key}": ')
                yield f'body_{index}: {head} arguments_{index} "}}"'
            yield f"arguments_{index}: {json_rule(tool.parameters, is_lenient=not tool.is_strict)}"

    def _call_body(self) -> str:
        """What follows the opener of a call."""
        if self._dialect.style is CallStyle.TAGGED:
            return f'"\\n" body "\\n" {self._marker(self._dialect.closer)}'
        return "body"

    @staticmethod
    def _list_body(is_parallel: bool) -> str:
        return '"[" body (", " body)* "]"' if is_parallel else '"[" body "]"'

    def _marker(self, text: str) -> str:
        return _marker(text, self._special_id)


def reasoning_lead(tags: ReasoningTags | None, phase: bool | None, special_id: SpecialId) -> str:
    """Lark rules for the thoughts before an answer; empty if none can come. `phase` is as of `reasoning_phase`."""
    if tags is None or phase is False:
        return ""
    thoughts = "thoughts GAP" if phase else f"({_marker(tags.opener, special_id)} thoughts GAP)?"
    rules = [f"lead: {thoughts}", _up_to("thoughts", tags.closer, special_id), _TEXT, "GAP: /[ \\n]{0,4}/"]
    return "\n".join(rules)


def _marker(text: str, special_id: SpecialId) -> str:
    token_id = special_id(text)
    return lark_string(text) if token_id is None else f"<[{token_id}]>"


def _up_to(rule: str, marker: str, special_id: SpecialId) -> str:
    """A rule for all text up to a marker and the marker: wherever it comes first, the rule ends."""
    token_id = special_id(marker)
    return f"{rule}[lazy]: TEXT {lark_string(marker)}" if token_id is None else f"{rule}: TEXT <[{token_id}]>"


def _source(rules: Sequence[str], lead: str) -> GrammarSource:
    return GrammarSource("lark", "\n".join(rules), lead)
