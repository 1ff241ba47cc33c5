"""A strict client of /v1/responses: it applies each event to what it holds, and objects to any other order."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import httpx

_ENDS = ("response.completed", "response.incomplete", "response.failed")


def named_events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream; each must be named as it says itself."""
    assert response.headers["content-type"].startswith("text/event-stream"), response.text
    events = []
    for block in response.text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    return events


def replay(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The response that the events tell of. Asserts that they come in OpenAI's order and agree with their end."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] in _ENDS
    assert not {*kinds[:-1]} & {*_ENDS}
    assert events[0]["response"]["status"] == "in_progress"
    output: list[dict[str, Any]] = []
    is_open = False
    for event in events[2:-1]:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert not is_open
            assert event["output_index"] == len(output)
            output.append(deepcopy(event["item"]))
            assert output[-1]["status"] == "in_progress"
            is_open = True
            continue
        assert is_open
        assert event["output_index"] == len(output) - 1
        _apply(output[-1], kind, event)
        is_open = kind != "output_item.done"
    assert not is_open
    final: dict[str, Any] = events[-1]["response"]
    assert final["output"] == output
    assert final["status"] == kinds[-1].removeprefix("response.")
    assert final["id"] == events[0]["response"]["id"]
    return final


def _apply(item: dict[str, Any], kind: str, event: dict[str, Any]) -> None:
    if kind == "output_item.done":
        item["status"] = event["item"]["status"]
        assert item == event["item"]
        return
    assert event["item_id"] == item["id"]
    if kind == "content_part.added":
        assert event["content_index"] == len(item["content"])
        item["content"].append(deepcopy(event["part"]))
    elif kind == "content_part.done":
        assert item["content"][-1] == event["part"]
    elif kind == "function_call_arguments.delta":
        item["arguments"] += event["delta"]
    elif kind == "function_call_arguments.done":
        assert (item["arguments"], item["name"]) == (event["arguments"], event["name"])
    else:
        part = item["content"][event["content_index"]]
        name, verb = kind.split(".")
        assert part["type"] == name
        if verb == "delta":
            part["text"] += event["delta"]
        else:
            assert verb == "done"
            assert part["text"] == event["text"]
        if name == "output_text" and verb == "delta":
            part["logprobs"] += event["logprobs"]
        elif name == "output_text":
            assert part["logprobs"] == event["logprobs"]


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    """What two answers to the same request have in common."""
    ids = ("id", "call_id")
    items = [{name: value for name, value in item.items() if name not in ids} for item in response["output"]]
    times = ("id", "created_at", "completed_at")
    return {**{name: value for name, value in response.items() if name not in times}, "output": items}
