"""ReasoningSplitter: tells a model's thoughts from its answer as the text comes.

Invariant: the pieces depend on the text alone, not on how it was cut. Thoughts stand at the beginning of an answer, if
anywhere; blanks around them belong to nobody.
"""

from __future__ import annotations

from enum import Enum, auto

from qengine.serving.dialect import ReasoningTags
from qengine.serving.marker import Marker
from qengine.serving.pieces import Piece


class _Phase(Enum):
    BEFORE = auto()
    THINKING = auto()
    AFTER = auto()
    ANSWER = auto()


def reasoning_phase(prompt: str, tags: ReasoningTags) -> bool | None:
    """Where a prompt leaves the model: True in its thoughts, False after them, None if they may still begin."""
    text = prompt.rstrip()
    if text.endswith(tags.opener):
        return True
    return False if text.endswith(tags.closer) else None


class ReasoningSplitter:
    """Splits one answer.

    Args:
        tags: None if the model does not think aloud.
        phase: see `reasoning_phase`.
    """

    def __init__(self, tags: ReasoningTags | None, phase: bool | None) -> None:
        self._tags = tags or ReasoningTags("", "")
        self._closer = Marker(self._tags.closer)
        self._held = ""
        self._has_begun = False
        if tags is None or phase is False:
            self._phase = _Phase.ANSWER
        else:
            self._phase = _Phase.THINKING if phase else _Phase.BEFORE

    @property
    def is_thinking(self) -> bool:
        """Whether thoughts have begun and not ended."""
        return self._phase is _Phase.THINKING

    def feed(self, char: str) -> list[Piece]:
        """Take one character."""
        if self._phase is _Phase.ANSWER:
            return [Piece("content", char)]
        if self._phase is _Phase.AFTER:
            if char.isspace():
                return []
            self._phase = _Phase.ANSWER
            return [Piece("content", char)]
        return self._begin(char) if self._phase is _Phase.BEFORE else self._think(char)

    def _begin(self, char: str) -> list[Piece]:
        self._held += char
        text = self._held.lstrip()
        if text == self._tags.opener:
            self._phase, self._held = _Phase.THINKING, ""
        elif not self._tags.opener.startswith(text):
            self._phase = _Phase.ANSWER
            held, self._held = self._held, ""
            return [Piece("content", held)]
        return []

    def _think(self, char: str) -> list[Piece]:
        passed, is_closed = self._closer.feed(char)
        if is_closed:
            # With the blanks before it.
            self._phase, self._held = _Phase.AFTER, ""
            return []
        self._held += passed
        if not self._has_begun:
            self._held = self._held.lstrip()
        text = self._held.rstrip()
        self._held = self._held[len(text) :]
        self._has_begun |= bool(text)
        return [Piece("reasoning", text)] if text else []

    def finish(self) -> list[Piece]:
        """What was kept, at the end of the text."""
        held, self._held = self._held, ""
        if self._phase is _Phase.THINKING:
            return [Piece("reasoning", (held + self._closer.flush()).rstrip())]
        return [Piece("content", held)]
