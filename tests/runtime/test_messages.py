"""Messages between an engine and its ranks: what is said arrives, and garbage is one error, quickly."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qengine.config import EngineConfig
from qengine.request import SamplingParams, TokenLogprobs
from qengine.runtime.channel import ProtocolError
from qengine.runtime.loader import LoadTimes
from qengine.runtime.messages import (
    Allocate,
    Check,
    Clear,
    Done,
    Entry,
    Failed,
    Joined,
    Loaded,
    Opened,
    Result,
    Sampling,
    Spent,
    Start,
    Step,
    Stop,
    decode_order,
    decode_report,
    encode,
)
from qengine.runtime.planner import Card, CardPlan, MemoryPlan

CARD = Card("a card", 24 * 2**30, 23 * 2**30)
CARD_PLAN = CardPlan("a card", 24 * 2**30, 1, 2, 3, 4, 5, 100, 16)
PLAN = MemoryPlan(256, 512, True, 64, 8, 16, 100, (CARD_PLAN,), ((1.0, 0.5), None))
OPTIONS = {
    "model": "/models/x",
    "tensor_parallel_size": 2,
    "kv_cache_memory_bytes": "1GiB",
    "max_model_len": "auto",
    "step_timeout": 2.5,
    "p2p": "off",
}
PARAMS = SamplingParams(temperature=0.5, stop=["a"], logit_bias={7: -1.5}, stop_token_ids=[3], logprobs=2, seed=5)
ENTRY = Entry(3, True, 16, (5, 6), 1, (9, 10), True, Sampling(PARAMS, 2**63 - 1, (1, 2), (0,)), (8,), 2, (6,))
ORDERS = [
    Start(EngineConfig.from_options(OPTIONS), PLAN, 1, "/proc/self/fd/9", "info", False, ("{}", None)),
    Allocate(PLAN),
    Step((ENTRY, Entry(0, False, 4, (1,), 2, (), False))),
    Clear((1, 2)),
    Check(),
    Stop(),
]
LOGPROBS = TokenLogprobs(4, -0.25, 1, ((4, -0.25), (5, -math.inf)))
REPORTS = [
    Opened(),
    Joined(),
    Loaded(CARD, 10**12, LoadTimes(10**12, 61.5, 60.0, 59.5)),
    Loaded(None, 0, LoadTimes(0, 0.5, 0.0, 0.5)),
    Done(),
    Spent(0.25),
    Result((4, -1), (LOGPROBS, None), {0: (LOGPROBS,)}, {1: "NaN"}),
    Failed("load", "a file is cut short"),
]
DECODERS = [(decode_order, ORDERS), (decode_report, REPORTS)]


@pytest.mark.parametrize(("decode", "messages"), DECODERS)
def test_what_is_said_arrives(decode: Callable[[bytes], Any], messages: list[Any]) -> None:
    for message in messages:
        assert decode(encode(message)) == message


@pytest.mark.parametrize(("decode", "others"), [(decode_order, REPORTS), (decode_report, ORDERS)])
def test_nobody_takes_the_others_messages(decode: Callable[[bytes], Any], others: list[Any]) -> None:
    for message in others:
        with pytest.raises(ProtocolError):
            decode(encode(message))


@pytest.mark.parametrize(
    "content",
    [
        ["Step"],
        ["Step", [], 1],
        ["Step", [[0, True, 0, [1], 0, [], 1]]],
        ["Step", [[0, True, 0, [-1], 0, [], False]]],
        ["Step", [[0, True, 0, [2**31], 0, [], False]]],
        ["Step", [[0, True, 0, [1.5], 0, [], False]]],
        ["Allocate", [256, 64, 16, 100, 2048]],
        ["Nothing"],
        ["Clear", "12"],
        {"type": "Stop"},
        None,
        ["Start", {"scheduler": {"max_num_seqs": 0}}, None, 0, "/x", "info", False],
        ["Start", {"load": {"quantization": "nonsense"}}, None, 0, "/x", "info", False],
        ["Start", {"load": {"trust_remote_code": []}}, None, "0", "/x", "info", False],
    ],
)
def test_wrong_fields_types_and_values_are_refused(content: Any) -> None:
    with pytest.raises(ProtocolError, match="cannot be read"):
        decode_order(msgspec.msgpack.encode(content))


@pytest.mark.parametrize("data", [b"", b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff" * 99, b"\x91" * 10**6])
def test_lengths_and_depths_that_are_not_there_cost_nothing(data: bytes) -> None:
    begin = time.monotonic()
    for whole in (data, encode(Stop())[:-1] + data):
        with pytest.raises(ProtocolError):
            decode_order(whole)
        with pytest.raises(ProtocolError):
            decode_report(whole)
    assert time.monotonic() - begin < 5.0


def _is_read_or_refused(data: bytes) -> None:
    for decode in (decode_order, decode_report):
        try:
            message = decode(data)
        except ProtocolError:
            continue
        assert type(message) in {type(known) for known in (*ORDERS, *REPORTS)}


@given(st.binary(max_size=200))
@settings(derandomize=True, deadline=None, max_examples=300)
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    _is_read_or_refused(data)


@given(st.sampled_from([*ORDERS, *REPORTS]), st.data())
@settings(derandomize=True, deadline=None, max_examples=500)
def test_broken_messages_are_read_or_refused(message: Any, data: st.DataObject) -> None:
    """Bytes changed, put in, and cut off, at random places of real messages."""
    content = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.integers(0, 2)):
            case 0:
                content[place] = data.draw(st.integers(0, 255))
            case 1:
                content[place:place] = data.draw(st.binary(max_size=4))
            case _:
                del content[place + 1 :]
    _is_read_or_refused(bytes(content))


_SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=9)
_VALUES = st.recursive(
    _SCALARS | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@given(st.sampled_from([type(message).__name__ for message in (*ORDERS, *REPORTS)]), st.lists(_VALUES, max_size=7))
@settings(derandomize=True, deadline=None, max_examples=100)
def test_well_formed_nonsense_is_read_or_refused(name: str, fields: list[Any]) -> None:
    _is_read_or_refused(msgspec.msgpack.encode([name, *fields]))
