"""ToolCallParser: finds tool calls in an answer as its text comes.

Invariant: the pieces depend on the text alone, not on how it was cut, so a stream joins to the whole answer. What looks
like a call and is none is content, to the last character; once a call's arguments have begun it stands. Blanks around
calls belong to nobody.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from qengine.serving.call_scanner import CallScanner, MalformedCallError
from qengine.serving.dialect import CallStyle, ToolDialect
from qengine.serving.marker import Marker
from qengine.serving.pieces import Piece

#: Longest text between [TOOL_CALLS] and [ARGS].
_MAX_HEAD_CHARS = 160
_HEAD = re.compile(r"\s*([A-Za-z0-9_.-]+)\s*(?:\[CALL_ID\]\s*[A-Za-z0-9_-]+\s*)?\[ARGS\]")


class ToolCallParser:
    """Parses one answer.

    Args:
        dialect: how the model writes calls.
        names: the functions there are.
        max_calls: further calls are left out; None for no limit.

    Attributes:
        num_calls: calls that have begun.
    """

    def __init__(self, dialect: ToolDialect, names: Collection[str], max_calls: int | None = None) -> None:
        self._dialect = dialect
        self._names = names
        self._max_calls = max_calls
        self._opener = Marker(dialect.opener)
        self._scanner = CallScanner(names)
        self._raw = ""  # Text that may turn out to be no call.
        self._lead: list[str] = []  # Blanks before that. Looking through all of them for each would take long.
        self._blanks: list[str] = []
        self._pieces: list[Piece] = []
        self._take: Callable[[str], None] = self._start if dialect.style is CallStyle.BARE else self._text
        self.num_calls = 0

    def feed(self, char: str) -> list[Piece]:
        """Take one character of the answer."""
        self._take(char)
        pieces, self._pieces = self._pieces, []
        return pieces

    def finish(self) -> list[Piece]:
        """What was kept, at the end of the answer."""
        if self._take == self._text:
            self._content(self._opener.flush())
        elif self._take != self._after and self._scanner.name is None:
            self._content(self._kept())
        if self._blanks and not self.num_calls:
            self._pieces.append(Piece("content", "".join(self._blanks)))
        pieces, self._pieces = self._pieces, []
        return pieces

    # Content

    def _content(self, text: str) -> None:
        """Pass text on, but blanks only once something follows them."""
        kept = text.rstrip()
        if kept:
            self._pieces.append(Piece("content", "".join(self._blanks) + kept))
            self._blanks = []
        if len(kept) < len(text):
            self._blanks.append(text[len(kept) :])

    def _leads(self, char: str) -> bool:
        """Keep a blank before anything else."""
        if self._raw or not char.isspace():
            return False
        self._lead.append(char)
        return True

    def _kept(self) -> str:
        """What was kept because it may turn out to be no call; it is no longer kept."""
        text = "".join(self._lead) + self._raw
        self._lead, self._raw = [], ""
        return text

    def _text(self, char: str) -> None:
        passed, is_open = self._opener.feed(char)
        self._content(passed)
        if is_open:
            self._raw = self._opener.text
            self._scanner = CallScanner(self._names)
            starts = {CallStyle.LIST: self._list, CallStyle.NAMED: self._head}
            self._take = starts.get(self._dialect.style, self._call)

    def _start(self, char: str) -> None:
        """The beginning of an answer that is either calls or content."""
        if self._leads(char):
            return
        self._raw += char
        if self._raw == "{":
            self._new_call(char, before=self._kept()[:-1])
        elif self._raw == self._opener.text:
            self._raw = self._kept()
            self._take = self._call
        elif not self._opener.text.startswith(self._raw):
            self._take = self._content
            self._content(self._kept())

    # Calls

    def _new_call(self, char: str = "", *, before: str = "") -> None:
        self._scanner = CallScanner(self._names)
        self._raw, self._take = before, self._call
        if char:
            self._call(char)

    def _list(self, char: str) -> None:
        if char == "[":
            self._new_call(before=self._raw + char)
        elif char == "{":
            self._new_call(char, before=self._raw)
        elif char.isspace():
            self._raw += char
        else:
            self._give_up(char)

    def _head(self, char: str) -> None:
        """The name before [ARGS]."""
        self._raw += char
        found = _HEAD.fullmatch(self._raw, len(self._opener.text))
        if found is not None and found[1] in self._names:
            for known in f'{{"name":"{found[1]}","arguments":':
                self._scanner.feed(known)
            self._take = self._call
        elif found is not None or len(self._raw) > _MAX_HEAD_CHARS:
            self._raw = self._raw[:-1]
            self._give_up(char)

    def _call(self, char: str) -> None:
        was_begun = self._scanner.name is not None
        try:
            arguments = self._scanner.feed(char)
            if self._dialect.style is CallStyle.NAMED and self._scanner.awaits_comma:
                arguments += self._scanner.feed("}")
        except MalformedCallError:
            self._give_up(char)
            return
        self._raw += char
        if self._scanner.name is not None and not was_begun:
            self._blanks = []
            self.num_calls += 1
            self._emit(Piece("call", self._scanner.name, self.num_calls - 1))
        if arguments:
            self._emit(Piece("arguments", arguments, self.num_calls - 1))
        if self._scanner.is_done:
            self._raw = ""
            self._take = self._text if self._dialect.style is CallStyle.NAMED else self._after

    def _emit(self, piece: Piece) -> None:
        if self._max_calls is None or piece.call < self._max_calls:
            self._pieces.append(piece)

    def _after(self, char: str) -> None:
        """Between the end of a call's object and what comes next."""
        if self._leads(char):
            return
        self._raw += char
        text = self._raw
        if self._dialect.style is CallStyle.TAGGED:
            if text == self._dialect.closer:
                self._kept()
                self._take = self._text
            elif not self._dialect.closer.startswith(text):
                self._leave()
        elif self._dialect.style is CallStyle.LIST and text == "]":
            self._kept()
            self._take = self._text
        elif text == (";" if self._dialect.style is CallStyle.BARE else ","):
            self._new_call(before=self._kept())
        elif text == "{" and self._dialect.style is CallStyle.BARE:
            self._new_call(char, before=self._kept()[:-1])
        else:
            self._leave()

    def _leave(self) -> None:
        """Back to content with what came after a call."""
        raw = self._kept()
        self._take = self._content if self._dialect.style is CallStyle.BARE else self._text
        for char in raw:
            self._take(char)

    def _give_up(self, char: str) -> None:
        """This is no call, or does not go on as one: `char` is text again, and so is all that was not reported."""
        if self._scanner.name is None:
            self._content(self._raw)
        self._raw = ""
        self._take = self._content if self._dialect.style is CallStyle.BARE else self._text
        self._take(char)
