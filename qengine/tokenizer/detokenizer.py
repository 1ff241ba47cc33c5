"""Text of a growing sequence of tokens, and the stop strings that end it.

    tokens --bytes--> whole characters --stop strings--> text that can be shown
               |                             |
        at most 3 bytes wait         what may begin a stop string waits

Invariant: what `feed` and `finish` return, joined, is the tokenizer's `decode` of all tokens, cut at the stop string.
Nothing shown is ever taken back. Work is constant per token (and per character for each stop string). It does not
decide when a sequence ends: it reports a stop string, the engine acts on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qengine.tokenizer.token_bytes import TextStream
from qengine.tokenizer.tokenizer import Tokenizer

MAX_CHARACTER_BYTES = 4


@dataclass(frozen=True, slots=True)
class StopMatch:
    """Stop string `stop` was completed by character number `end` (counted from 1) of the text just searched."""

    stop: str
    end: int


class StopMatcher:
    """Finds the first stop string to be complete in a growing text (the longest, where several end together).

    Each string is followed by Knuth, Morris and Pratt's automaton: its state is how much of the string the text ends
    with, so a string is found across any borders and the text that must wait is known exactly.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        # The longest first: the first to complete is then the one to report.
        self._stops = sorted({stop for stop in stops if stop}, key=len, reverse=True)
        self._borders = [_borders(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)

    @property
    def num_pending(self) -> int:
        """How many characters at the end of the text may be the beginning of a stop string."""
        return max(self._states, default=0)

    def push(self, text: str) -> StopMatch | None:
        """Go on by `text`; the match if a stop string is complete, after which the matcher must not be used again."""
        if not self._stops:
            return None
        for position, character in enumerate(text, start=1):
            for index, stop in enumerate(self._stops):
                state, borders = self._states[index], self._borders[index]
                while state and stop[state] != character:
                    state = borders[state - 1]
                state += stop[state] == character
                if state == len(stop):
                    return StopMatch(stop, position)
                self._states[index] = state
        return None


def _borders(stop: str) -> list[int]:
    """For each prefix of `stop`, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(stop)
    state = 0
    for index in range(1, len(stop)):
        while state and stop[state] != stop[index]:
            state = borders[state - 1]
        state += stop[state] == stop[index]
        borders[index] = state
    return borders


class IncrementalDetokenizer:
    """The text of one output as its tokens come.

    Args:
        tokenizer: whose tokens they are.
        prompt_token_ids: what the output continues. Its text is not given, but it decides whether the output is the
            start of a text (where SentencePiece drops a space), and a character that its last tokens begin belongs
            to the output.
        skip_special_tokens: special tokens give no text.
        stop: strings that end the text.
        include_stop_str: whether the text keeps the stop string at its end.
        min_tokens: stop strings are looked for only in the text of the tokens after this many.

    Attributes:
        stop_reason: the stop string that ended the text, or None.
        num_tokens: tokens fed, up to and with the one that completed the stop string; later ones are ignored.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prompt_token_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop_str: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._matcher = StopMatcher(stop)
        self._include_stop_str = include_stop_str
        self._min_tokens = min_tokens
        self._stream = TextStream(tokenizer.decoding_rule)
        self._is_first = True
        self._shown: list[str] = []
        self._waiting = ""
        self._is_finished = False
        self.stop_reason: str | None = None
        self.num_tokens = 0
        self._go_past(prompt_token_ids)

    @property
    def text(self) -> str:
        """All the text that `feed` and `finish` have returned."""
        self._shown = ["".join(self._shown)]
        return self._shown[0]

    def feed(self, token_ids: Sequence[int]) -> str:
        """Add tokens; the new text that can be shown. After a stop string or `finish` it is always empty."""
        shown = []
        for token_id in token_ids:
            if self._is_finished or self.stop_reason is not None:
                break
            self.num_tokens += 1
            shown.append(self._admit(self._stream.push(self._bytes(token_id))))
        return self._show("".join(shown))

    def finish(self) -> str:
        """The rest, when no token will follow: what waited, and U+FFFD for an incomplete character."""
        if self._is_finished or self.stop_reason is not None:
            return ""
        self._is_finished = True
        rest = self._admit(self._stream.finish())
        if self.stop_reason is None:
            rest, self._waiting = rest + self._waiting, ""
        return self._show(rest)

    def _bytes(self, token_id: int) -> bytes:
        if token_id in self._skipped:
            return b""
        data = self._tokenizer.token_bytes(token_id, is_first=self._is_first)
        self._is_first = False
        return data

    def _admit(self, text: str) -> str:
        """Look for stop strings in `text`; the part of it, and of what waited, that can be shown."""
        if self.num_tokens <= self._min_tokens:
            return text
        match = self._matcher.push(text)
        text_before, self._waiting = self._waiting, ""
        candidate = text_before + text
        if match is not None:
            self.stop_reason = match.stop
            end = len(text_before) + match.end
            return candidate[: end if self._include_stop_str else end - len(match.stop)]
        if self._include_stop_str:
            return candidate
        end = len(candidate) - self._matcher.num_pending
        self._waiting = candidate[end:]
        return candidate[:end]

    def _show(self, text: str) -> str:
        if text:
            self._shown.append(text)
        return text

    def _go_past(self, prompt_token_ids: Sequence[int]) -> None:
        """Bring the stream to where the prompt's text ends, looking at no more of the prompt than that needs."""
        for token_id in prompt_token_ids:
            if self._stream.push(self._bytes(token_id)):
                break
        self._stream.drop_pending()
        tail = b""
        for token_id in reversed(prompt_token_ids):
            if len(tail) >= MAX_CHARACTER_BYTES:
                break
            tail = self._bytes(token_id) + tail
        self._stream.push(tail)
