"""CallScanner: reads one tool call, ``{"name": ..., "arguments": {...}}``, character by character as a model writes it.

Invariant: what it reports depends on the text alone, not on how it was cut into pieces. A call whose arguments have
begun cannot be taken back, so nothing is reported before the function's name is known to exist. Arguments are passed on
as they were written; whether they are valid JSON inside is for whoever called.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from enum import Enum, auto

from qengine.serving.pieces import whole_characters

_CLOSERS = {"{": "}", "[": "]"}
_BLANKS = " \t\r\n"


class MalformedCallError(Exception):
    """This is no tool call."""


class _Place(Enum):
    """What may come next at the top level of the object."""

    OBJECT = auto()
    KEY_OR_END = auto()
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    IN_VALUE = auto()
    COMMA_OR_END = auto()
    DONE = auto()


class CallScanner:
    """Reads one call.

    Args:
        names: the functions there are.
        keys: how the model calls the arguments.

    Attributes:
        name: the function's name once the call has begun, that is, name and arguments are known to be there.
        is_done: the object is closed.
    """

    def __init__(self, names: Collection[str], keys: Collection[str] = ("arguments", "parameters")) -> None:
        self._names = names
        self._keys = keys
        self._place = _Place.OBJECT
        self._key = ""
        self._raw = ""
        self._stack: list[str] = []
        self._in_string = False
        self._is_escaped = False
        self._found_name: str | None = None
        self._has_arguments = False
        self._held = ""
        self.name: str | None = None

    @property
    def is_done(self) -> bool:
        return self._place is _Place.DONE

    @property
    def awaits_comma(self) -> bool:
        """A value has ended and the object has not."""
        return self._place is _Place.COMMA_OR_END

    def feed(self, char: str) -> str:
        """Take one character; returns the piece of the arguments that may be passed on with it.

        Raises:
            MalformedCallError: this cannot be a call. What was passed on before stands.
        """
        if self._place is _Place.IN_VALUE:
            self._continue_value(char)
        elif char not in _BLANKS or self._in_string:
            self._at_top(char)
        return self._release()

    def _release(self) -> str:
        """Begin the call as soon as it is certain, and hand out the arguments that wait."""
        if self.name is None:
            is_begun = self._found_name is not None and (self._has_arguments or self.is_done)
            if not is_begun:
                return ""
            self.name = self._found_name
        if self.is_done and not self._has_arguments:
            self._has_arguments, self._held = True, "{}"
        piece, self._held = self._held, ""
        return piece

    def _at_top(self, char: str) -> None:
        place = self._place
        if place is _Place.OBJECT and char == "{":
            self._place = _Place.KEY_OR_END
        elif place in (_Place.KEY_OR_END, _Place.KEY):
            self._take_key(char)
        elif place is _Place.COLON and char == ":":
            self._place = _Place.VALUE
        elif place is _Place.VALUE:
            self._begin_value(char)
        elif place is _Place.COMMA_OR_END and char == ",":
            self._place = _Place.KEY
        elif place is _Place.COMMA_OR_END and char == "}":
            self._end()
        else:
            raise MalformedCallError

    def _take_key(self, char: str) -> None:
        if self._in_string:
            self._raw += char
            if self._ends_string(char):
                self._key, self._place = _decoded(self._raw), _Place.COLON
        elif char == '"':
            self._in_string, self._raw = True, char
        else:
            raise MalformedCallError

    def _ends_string(self, char: str) -> bool:
        """Follow a string by one character; whether it is closed."""
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped = True
        elif char == '"':
            self._in_string = False
            return True
        return False

    def _begin_value(self, char: str) -> None:
        is_arguments = self._key in self._keys
        if char in ",]}" or (is_arguments and (self._has_arguments or char not in '{"')):
            raise MalformedCallError
        if self._key == "name" and (self._found_name is not None or char != '"'):
            raise MalformedCallError
        self._place, self._raw, self._stack = _Place.IN_VALUE, "", []
        self._has_arguments |= is_arguments and char == "{"
        self._continue_value(char)

    def _continue_value(self, char: str) -> None:
        is_word = bool(self._raw) and self._raw[0] not in '{["'
        if is_word and (char in ",}" or char in _BLANKS):
            # A number or a word ends where something else begins.
            self._end_value()
            if char not in _BLANKS:
                self._at_top(char)
            return
        self._raw += char
        if self._streams:
            self._held += char
        if self._in_string:
            is_closed = self._ends_string(char) and not self._stack
        else:
            is_closed = self._nest(char)
        if is_closed:
            self._end_value()

    @property
    def _streams(self) -> bool:
        return self._key in self._keys and self._raw[0] == "{"

    def _nest(self, char: str) -> bool:
        """Follow brackets by one character outside strings; whether the value is closed."""
        if char == '"':
            self._in_string = True
        elif char in _CLOSERS:
            self._stack.append(_CLOSERS[char])
        elif char in "]}":
            if not self._stack or self._stack.pop() != char:
                raise MalformedCallError
            return not self._stack
        return False

    def _end_value(self) -> None:
        self._place = _Place.COMMA_OR_END
        if self._key == "name":
            self._found_name = _decoded(self._raw)
            if self._found_name not in self._names:
                raise MalformedCallError
        elif self._key in self._keys and not self._streams:
            # Some models write the arguments as a string that holds JSON.
            self._held += _decoded(self._raw)
            self._has_arguments = True

    def _end(self) -> None:
        if self._found_name is None:
            raise MalformedCallError
        self._place = _Place.DONE


def _decoded(raw: str) -> str:
    try:
        return whole_characters(str(json.loads(raw)))
    except ValueError as error:
        raise MalformedCallError from error
