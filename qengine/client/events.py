"""Server-sent events out of bytes, and chat chunks out of events.

Invariant: however the bytes are cut, the events are the same; nothing is read or waited for here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qengine.errors import QEngineError

DONE = "[DONE]"
#: More than this without an end of line is no event stream.
_MAX_LINE_BYTES = 16 * 2**20


class StreamError(QEngineError):
    """What the server sent is not the stream it should be, or says that it failed."""


class EventParser:
    """`feed` takes bytes as they come and gives the data of the events that they complete."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []

    def feed(self, received: bytes) -> list[str]:
        """The data of each event that is now complete. Raises StreamError for a line without an end."""
        *lines, self._rest = (self._rest + received).split(b"\n")
        if len(self._rest) > _MAX_LINE_BYTES:
            raise StreamError(f"the server sent {len(self._rest)} bytes without an end of line, expected short events")
        events = []
        for line in lines:
            text = line.removesuffix(b"\r").decode("utf-8", errors="replace")
            if text.startswith("data:"):
                self._data.append(text[5:].removeprefix(" "))
            elif not text and self._data:
                events.append("\n".join(self._data))
                self._data.clear()
        return events


def parse_chunk(data: str) -> Mapping[str, Any]:
    """One event's JSON object. Raises StreamError if it is none, or an error of the server."""
    try:
        chunk = json.loads(data)
    except ValueError:
        chunk = None
    if not isinstance(chunk, dict):
        raise StreamError(f"the server sent {data[:80]!r}, expected a JSON object")
    if "error" in chunk:
        raise StreamError(f"the server failed: {error_message(chunk) or 'it does not say why'}")
    return chunk


def error_message(body: Any) -> str | None:
    """The message of an error object in OpenAI's shape, if `body` is one."""
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) else None


def text_of(chunk: Mapping[str, Any]) -> str:
    """The new text of a chat or completion chunk, reasoning included; "" if there is none."""
    choices = chunk.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    delta = choice.get("delta")
    holder = delta if isinstance(delta, dict) else choice
    return "".join(str(holder[name]) for name in ("reasoning_content", "content", "text") if holder.get(name))


def finish_reason_of(chunk: Mapping[str, Any]) -> str | None:
    """Why the first choice has ended, if this chunk says so."""
    choices = chunk.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    reason = choice.get("finish_reason")
    return reason if isinstance(reason, str) else None


def num_tokens_of(chunk: Mapping[str, Any]) -> int | None:
    """The completion tokens that a chunk with usage counts."""
    usage = chunk.get("usage")
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) and not isinstance(count, bool) else None
