"""Frames over a socket: whole, in order, bounded, and an error for everything else."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qengine.runtime import channel
from qengine.runtime.channel import Channel, ChannelClosedError, ProtocolError

SECONDS = 20.0


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    one, other = (Channel(end) for end in socket.socketpair())
    yield one, other
    one.close()
    other.close()


def test_messages_arrive_whole_and_in_order(pair: tuple[Channel, Channel]) -> None:
    one, other = pair
    # More than a socket holds, so that sending waits for receiving.
    messages = [b"", b"x", bytes(range(256)) * 8192, b"end"]
    sender = threading.Thread(target=lambda: [one.send(message, SECONDS) for message in messages])
    sender.start()
    assert [other.receive(SECONDS) for _ in messages] == messages
    sender.join()
    assert other.try_receive() is None


@given(st.lists(st.binary(max_size=40), max_size=5), st.integers(1, 7))
@settings(derandomize=True, deadline=None, max_examples=50)
def test_frames_are_put_together_from_any_pieces(messages: list[bytes], size: int) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        reader = Channel(theirs)
        stream = b"".join(struct.pack("<I", len(message)) + message for message in messages)
        found = []
        for first in range(0, len(stream), size):
            ours.sendall(stream[first : first + size])
            while (message := reader.try_receive()) is not None:
                found.append(message)
        assert found == messages
        reader.close()


def test_a_closed_channel_says_so_to_both(pair: tuple[Channel, Channel]) -> None:
    one, other = pair
    one.send(b"last words")
    one.close()
    assert other.receive(SECONDS) == b"last words"
    with pytest.raises(ChannelClosedError, match="closed"):
        other.receive(SECONDS)
    with pytest.raises(ChannelClosedError, match="nobody"):
        other.send(b"hello?")


def test_nothing_waits_longer_than_it_is_told(pair: tuple[Channel, Channel]) -> None:
    one, other = pair
    with pytest.raises(TimeoutError):
        one.receive(0.05)
    with pytest.raises(TimeoutError):
        one.send(bytes(2**23), 0.05)
    assert other.try_receive() is None


def test_a_length_out_of_bounds_is_refused_before_it_costs_anything(
    pair: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        reader = Channel(theirs)
        ours.sendall(b"\xff\xff\xff\xff")
        with pytest.raises(ProtocolError, match="4294967295"):
            reader.receive(SECONDS)
        reader.close()
    monkeypatch.setattr(channel, "MAX_FRAME_BYTES", 10)
    with pytest.raises(ProtocolError, match="11 bytes"):
        pair[0].send(b"x" * 11)
