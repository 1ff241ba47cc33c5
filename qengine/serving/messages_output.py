"""The content blocks of a message, growing as its parts come, and the events that tell of it.

Invariant: whoever applies the events in order holds exactly `blocks`. A block is open until the next begins or the
answer ends; each that was started is stopped once. It knows nothing of requests.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from qengine.serving.pieces import Piece, whole_characters

Event = dict[str, Any]
Json = dict[str, Any]
#: Of a piece -> the type of the block it belongs to, the block's field, and the type and field of its delta.
_FIELDS = {
    "content": ("text", "text", "text_delta", "text"),
    "reasoning": ("thinking", "thinking", "thinking_delta", "thinking"),
    "arguments": ("tool_use", "input", "input_json_delta", "partial_json"),
}


class MessageOutput:
    """Makes the blocks of one answer.

    Args:
        new_call_id: what the result of a call will refer to it by.

    Attributes:
        blocks: as they are now; a call's `input` is an object once its block is stopped.
        has_calls: whether a tool is called.
    """

    def __init__(self, new_call_id: Callable[[], str]) -> None:
        self.blocks: list[Json] = []
        self.has_calls = False
        self._new_call_id = new_call_id
        self._is_open = False
        self._arguments = ""

    def feed(self, pieces: Sequence[Piece]) -> list[Event]:
        """Take what the answer gained; returns the events."""
        return [event for piece in pieces for event in self._take(piece)]

    def finish(self) -> list[Event]:
        """End the block that is open, if there is one."""
        if not self._is_open:
            return []
        self._is_open = False
        block = self.blocks[-1]
        if block["type"] == "tool_use":
            block["input"] = _object(self._arguments)
        return [{"type": "content_block_stop", "index": len(self.blocks) - 1}]

    def _take(self, piece: Piece) -> list[Event]:
        if piece.kind == "call":
            self.has_calls = True
            return self._start({"type": "tool_use", "id": self._new_call_id(), "name": piece.text, "input": {}})
        kind, field, delta, delta_field = _FIELDS[piece.kind]
        events: list[Event] = []
        if not self._is_open or self.blocks[-1]["type"] != kind:
            # Arguments of a call whose block was stopped have nowhere to go; the parser never sends them.
            assert kind != "tool_use"
            more = {"signature": ""} if kind == "thinking" else {}
            events = self._start({"type": kind, field: "", **more})
        if kind == "tool_use":
            self._arguments += piece.text
        else:
            self.blocks[-1][field] += piece.text
        change = {"type": delta, delta_field: piece.text}
        return [*events, {"type": "content_block_delta", "index": len(self.blocks) - 1, "delta": change}]

    def _start(self, block: Json) -> list[Event]:
        ended = self.finish()
        self._arguments = ""
        is_first = not self.blocks
        self.blocks.append(block)
        self._is_open = True
        started = {"type": "content_block_start", "index": len(self.blocks) - 1, "content_block": dict(block)}
        return [*ended, started, *([{"type": "ping"}] if is_first else [])]


def _object(arguments: str) -> Json:
    """A call's arguments; none where the answer was cut before they were whole, or where JSON could not say them."""
    try:
        found = _sayable(json.loads(arguments or "{}", parse_constant=_refuse_number))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _sayable(value: Any) -> Any:
    """The same value in whole characters. Raises ValueError for a number beyond all bounds."""
    if isinstance(value, str):
        return whole_characters(value)
    if isinstance(value, list):
        return [_sayable(item) for item in value]
    if isinstance(value, dict):
        return {whole_characters(name): _sayable(item) for name, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        _refuse_number(str(value))
    return value


def _refuse_number(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")
