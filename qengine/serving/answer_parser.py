"""AnswerParser: an answer's text, as it comes, in its parts: thoughts, content, tool calls.

Invariant: the pieces of a stream, joined, are those of the whole text, however it is cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qengine.serving.dialect import ReasoningTags, ToolDialect
from qengine.serving.pieces import Piece, joined
from qengine.serving.reasoning import ReasoningSplitter
from qengine.serving.tool_parser import ToolCallParser


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """What to look for in answers.

    Attributes:
        tags: None if the model does not think aloud.
        phase: where the prompt leaves it, see `reasoning_phase`.
        dialect: how tools are called; None if there are none to call.
        names: the functions there are.
        max_calls: further calls are left out.
    """

    tags: ReasoningTags | None = None
    phase: bool | None = None
    dialect: ToolDialect | None = None
    names: frozenset[str] = frozenset()
    max_calls: int | None = None


class AnswerParser:
    """Parses one choice."""

    def __init__(self, form: AnswerForm) -> None:
        self._is_plain = form.tags is None and form.dialect is None
        self._reasoning = ReasoningSplitter(form.tags, form.phase)
        self._tools = None if form.dialect is None else ToolCallParser(form.dialect, form.names, form.max_calls)

    @property
    def num_calls(self) -> int:
        return 0 if self._tools is None else self._tools.num_calls

    @property
    def is_thinking(self) -> bool:
        """Whether thoughts have begun and not ended."""
        return self._reasoning.is_thinking

    def feed(self, text: str, *, is_last: bool) -> list[Piece]:
        """The pieces that new text makes certain; `is_last` if the answer ends with it."""
        if self._is_plain:
            return [Piece("content", text)] if text else []
        pieces = [piece for char in text for part in self._reasoning.feed(char) for piece in self._within(part)]
        if is_last:
            pieces += [piece for part in self._reasoning.finish() for piece in self._within(part)]
            pieces += [] if self._tools is None else self._tools.finish()
        return joined(pieces)

    def _within(self, part: Piece) -> Iterator[Piece]:
        if self._tools is None or part.kind != "content":
            yield part
            return
        for char in part.text:
            yield from self._tools.feed(char)
