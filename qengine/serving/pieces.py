"""Piece: a bit of an answer and what it is part of; joining them, and what text may hold."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["reasoning", "content", "call", "arguments"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A bit of an answer.

    Attributes:
        kind: what `text` is: thoughts, the answer itself, the name of a function that is called (once per call, before
            its arguments), or a part of the call's arguments.
        call: number of the call, from 0.
    """

    kind: Kind
    text: str
    call: int = -1


_SURROGATE = re.compile("[\ud800-\udfff]")


def whole_characters(text: str) -> str:
    """The text with U+FFFD for halves of surrogate pairs: JSON's escapes can say them, UTF-8 cannot."""
    return _SURROGATE.sub("\ufffd", text)


def joined(pieces: Iterable[Piece]) -> list[Piece]:
    """The same with neighbours of one kind in one piece, and without empty ones."""
    found: list[Piece] = []
    for piece in pieces:
        last = found[-1] if found else None
        if last is not None and last.kind == piece.kind != "call" and last.call == piece.call:
            found[-1] = replace(last, text=last.text + piece.text)
        elif piece.text:
            found.append(piece)
    return found
