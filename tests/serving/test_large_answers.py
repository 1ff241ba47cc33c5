"""Answers with very many log-probabilities: bounded, and made in slices or in a thread: nobody waits for them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qengine.request import Logprob
from qengine.serving import generation, large_json
from qengine.serving.generation import Delta, in_turns
from qengine.serving.limits import Limits
from qengine.serving.logprobs import SLICE_POSITIONS
from tests.serving.response_events import named_events, replay
from tests.serving.running import Running
from tests.serving.test_http import assert_error
from tests.serving.tiny import TEXT, body, small_server

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
IDS = [5 + index % 1000 for index in range(400)]
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with small_server(max_model_len=512) as running:
        yield running
        running.engine.check_integrity()


# Slices


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)


@settings(derandomize=True, deadline=None)
@given(value=st.dictionaries(st.text(), _JSON), depth=st.integers(0, 5))
def test_large_json_is_json(value: dict[str, Any], depth: int) -> None:
    assert json.loads(b"".join(large_json.large_json(value, depth=depth))) == value


def test_long_lists_are_cut_and_blocks_are_small() -> None:
    items = [{"a": "é" * 20, "b": [index]} for index in range(20_000)]
    value = {"few": [{"many": items, "flat": list(range(70_000))}], "none": [], "nothing": {}}
    blocks = large_json.large_json(value, depth=3)
    assert json.loads(b"".join(blocks)) == value
    assert len(blocks) > 2
    assert max(len(block) for block in blocks) < 2**20


def gain(num_positions: int, text: str = "text") -> Delta:
    return Delta(text, list(range(num_positions)), [{i: Logprob(-1.0, 1)} for i in range(num_positions)], "stop", None)


def test_a_large_gain_comes_in_turns_that_are_the_whole_together() -> None:
    whole = gain(3 * SLICE_POSITIONS + 5)
    turns = list(in_turns([(0, gain(10)), (1, whole), (2, gain(0))]))
    assert max(sum(len(delta.token_ids) for _, delta in turn) for turn in turns) <= SLICE_POSITIONS
    parts = [delta for turn in turns for index, delta in turn if index == 1]
    assert "".join(part.text for part in parts) == whole.text
    assert [token_id for part in parts for token_id in part.token_ids] == whole.token_ids
    assert [position for part in parts for position in part.logprobs or ()] == whole.logprobs
    assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + ["stop"]


def test_a_small_gain_is_one_turn() -> None:
    deltas = [(index, gain(1)) for index in range(8)]
    assert list(in_turns(deltas)) == [deltas]
    text = Delta("x" * 10**6, list(range(10**4)), None, None, None)
    assert list(in_turns([(0, text)])) == [[(0, text)]]


# Answers


def joined(response: Any) -> dict[str, Any]:
    """A completions choice out of its stream."""
    lines = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    choices = [choice for line in lines for choice in line["choices"]]
    logprobs: dict[str, list[Any]] = {}
    for choice in choices:
        for name, values in (choice["logprobs"] or {}).items():
            logprobs.setdefault(name, []).extend(values)
    assert max(len((choice["logprobs"] or {"tokens": []})["tokens"]) for choice in choices) <= SLICE_POSITIONS
    return {"text": "".join(choice["text"] for choice in choices), "logprobs": logprobs}


@pytest.mark.parametrize("num_top", [0, 20])
def test_a_long_echo_is_the_same_in_slices(server: Running, num_top: int) -> None:
    asked = body(prompt=IDS, echo=True, logprobs=num_top, max_tokens=5)
    whole = server.post(TEXT, asked).json()["choices"][0]
    assert len(whole["logprobs"]["tokens"]) == len(IDS) + 5
    assert joined(server.post(TEXT, {**asked, "stream": True})) == {k: whole[k] for k in ("text", "logprobs")}


def test_a_large_answer_is_made_in_a_thread(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    real = large_json.large_json

    def watched(*args: Any, **more: Any) -> list[bytes]:
        threads.append(threading.current_thread().name)
        return real(*args, **more)

    monkeypatch.setattr(large_json, "large_json", watched)
    asked = {"model": "tiny", "temperature": 0, "ignore_eos": True, "top_logprobs": 20}
    chat = server.post(CHAT, {**asked, "messages": MESSAGES, "max_tokens": 300, "logprobs": True})
    content = chat.json()["choices"][0]["logprobs"]["content"]
    assert [len(entry["top_logprobs"]) for entry in content] == [20] * 300
    response = server.post(RESPONSES, {**asked, "input": "hi", "max_output_tokens": 300}).json()
    assert response["output"][0]["content"][0]["logprobs"][:2] == content[:2]
    assert len(threads) == 2
    assert all(name.startswith("qengine-long") for name in threads)
    small = server.post(CHAT, {**asked, "messages": MESSAGES, "max_tokens": 3, "logprobs": True})
    assert len(small.json()["choices"][0]["logprobs"]["content"]) == 3
    assert len(threads) == 2
    streamed = replay(
        named_events(server.post(RESPONSES, {**asked, "input": "hi", "max_output_tokens": 300, "stream": True}))
    )
    assert streamed["output"][0]["content"] == response["output"][0]["content"]


# The limit


def test_more_log_probabilities_than_an_answer_may_hold(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "LIMITS", Limits(num_logprobs=2100))
    assert server.post(TEXT, body(prompt=IDS[:90], echo=True, logprobs=20, max_tokens=10)).status_code == 200
    for more in ({"max_tokens": 11}, {"prompt": IDS[:91]}, {"n": 2}, {"prompt": [IDS[:50], IDS[:50]]}):
        asked = body(**{"prompt": IDS[:90], "echo": True, "logprobs": 20, "max_tokens": 10, **more})
        said = assert_error(server.post(TEXT, asked), 400, param="logprobs")
        assert "2100" in said
        assert_error(server.post(TEXT, {**asked, "stream": True}), 400, param="logprobs")
        assert server.post(TEXT, {**asked, "echo": False, "logprobs": 0}).status_code == 200
    chat = {"model": "tiny", "messages": MESSAGES, "logprobs": True, "top_logprobs": 20}
    assert_error(server.post(CHAT, {**chat, "max_tokens": 101}), 400, param="top_logprobs")
    assert server.post(CHAT, {**chat, "max_tokens": 100}).status_code == 200
    # As many tokens as the context holds.
    assert_error(server.post(CHAT, chat), 400, param="top_logprobs")
    response = {"model": "tiny", "input": "hi", "top_logprobs": 20, "max_output_tokens": 101}
    assert_error(server.post(RESPONSES, response), 400, param="top_logprobs")
    server.wait_until_quiet()
