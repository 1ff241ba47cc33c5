"""The output items of a response, growing as its parts come, and the events that tell of it.

Invariant: whoever applies the events in order holds exactly `items`. An item is open until the next begins or the
answer ends; each that was added is done once. It knows nothing of requests.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any

from qengine.serving.pieces import Piece

Event = dict[str, Any]
Json = dict[str, Any]


class ResponseOutput:
    """Makes the items of one answer.

    Args:
        new_call_id: what the result of a call will refer to it by.

    Attributes:
        items: as they are now.
        thoughts: all thoughts so far.
    """

    def __init__(self, new_call_id: Callable[[], str]) -> None:
        self.items: list[Json] = []
        self.thoughts = ""
        self._new_call_id = new_call_id
        self._open: Json | None = None
        self._call = -1
        self._logprobs: list[Json] = []  # Of tokens whose text has not been sent.

    def feed(self, pieces: Sequence[Piece], logprobs: Sequence[Json] = ()) -> list[Event]:
        """Take what the answer gained; returns the events. `logprobs` of text in no message go to the next one."""
        self._logprobs += logprobs
        return [event for piece in pieces for event in self._take(piece)]

    def finish(self, status: str) -> list[Event]:
        """End the answer: the item that is open becomes `status`, "completed" or "incomplete"."""
        events: list[Event] = []
        if status == "completed" and not any(item["type"] != "reasoning" for item in self.items):
            events += [*self._close("completed"), *self._begin_message()]
        if self._open is not None and self._open["type"] == "message" and self._logprobs:
            events += self._text_delta("")
        return [*events, *self._close(status)]

    # Pieces

    def _take(self, piece: Piece) -> list[Event]:
        if piece.kind == "call":
            return [*self._close("completed"), *self._begin_call(piece)]
        if piece.kind == "arguments":
            # Those of a call whose item was closed have nowhere to go; the parser never sends them.
            assert self._open is not None
            assert piece.call == self._call
            self._open["arguments"] += piece.text
            return [self._event("response.function_call_arguments.delta", delta=piece.text)]
        kind = "message" if piece.kind == "content" else "reasoning"
        events: list[Event] = []
        if self._open is None or self._open["type"] != kind:
            events = self._close("completed")
            events += self._begin_message() if kind == "message" else self._begin_reasoning()
        return [*events, *(self._text_delta(piece.text) if kind == "message" else self._thoughts_delta(piece.text))]

    def _text_delta(self, text: str) -> list[Event]:
        logprobs, self._logprobs = self._logprobs, []
        part = self._part()
        part["text"] += text
        part["logprobs"] += logprobs
        return [self._event("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs)]

    def _thoughts_delta(self, text: str) -> list[Event]:
        self._part()["text"] += text
        self.thoughts += text
        return [self._event("response.reasoning_text.delta", content_index=0, delta=text)]

    # Items

    def _begin_message(self) -> list[Event]:
        item = {"id": _new_id("msg"), "type": "message", "status": "in_progress", "role": "assistant", "content": []}
        return [self._add(item), self._add_part({"type": "output_text", "text": "", "annotations": [], "logprobs": []})]

    def _begin_reasoning(self) -> list[Event]:
        item = {"id": _new_id("rs"), "type": "reasoning", "status": "in_progress", "summary": [], "content": []}
        return [self._add(item), self._add_part({"type": "reasoning_text", "text": ""})]

    def _begin_call(self, piece: Piece) -> list[Event]:
        self._call = piece.call
        item = {"id": _new_id("fc"), "type": "function_call", "status": "in_progress", "call_id": self._new_call_id()}
        return [self._add({**item, "name": piece.text, "arguments": ""})]

    def _add(self, item: Json) -> Event:
        self.items.append(item)
        self._open = item
        return {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": _copy(item)}

    def _add_part(self, part: Json) -> Event:
        assert self._open is not None
        self._open["content"].append(part)
        return self._event("response.content_part.added", content_index=0, part=_copy(part))

    def _close(self, status: str) -> list[Event]:
        """The events that end the open item, if there is one."""
        item = self._open
        if item is None:
            return []
        item["status"] = status
        events = self._end_call(item) if item["type"] == "function_call" else self._end_part(item)
        events.append({"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": _copy(item)})
        self._open = None
        return events

    def _end_call(self, item: Json) -> list[Event]:
        done = "response.function_call_arguments.done"
        return [self._event(done, name=item["name"], arguments=item["arguments"])]

    def _end_part(self, item: Json) -> list[Event]:
        part = self._part()
        if item["type"] == "message":
            text = {"text": part["text"], "logprobs": list(part["logprobs"])}
            done = self._event("response.output_text.done", content_index=0, **text)
        else:
            done = self._event("response.reasoning_text.done", content_index=0, text=part["text"])
        return [done, self._event("response.content_part.done", content_index=0, part=_copy(part))]

    def _part(self) -> Json:
        assert self._open is not None
        part: Json = self._open["content"][0]
        return part

    def _event(self, kind: str, **more: Any) -> Event:
        assert self._open is not None
        return {"type": kind, "item_id": self._open["id"], "output_index": len(self.items) - 1, **more}


def _copy(item: Json) -> Json:
    """As it is now: it goes on growing."""
    copied = dict(item)
    if "content" in item:
        copied["content"] = [_copy(part) for part in item["content"]]
    if "logprobs" in item:
        copied["logprobs"] = list(item["logprobs"])
    return copied


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
