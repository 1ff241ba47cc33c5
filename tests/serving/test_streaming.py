"""Event streams as ASGI: clients that leave, that stop reading, and errors after the first byte."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

import pytest
from starlette.requests import Request

from qengine.errors import EngineDeadError
from qengine.request import CompletionOutput
from qengine.serving.body import ClientGoneError
from qengine.serving.generation import Progress
from qengine.serving.streaming import Chunks, EventStream, event_stream, named_event_stream, while_connected


class Client:
    """The other end of an ASGI connection."""

    def __init__(self, *, leaves: asyncio.Event | None = None, reads: bool = True) -> None:
        self.leaves = leaves or asyncio.Event()
        self.reads = reads
        self.received = b""
        self.is_complete = False

    async def receive(self) -> dict[str, Any]:
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.body":
            self.received += message["body"]
            self.is_complete = not message.get("more_body", False)
            if not self.reads:
                await asyncio.Event().wait()

    def request(self) -> Request:
        return Request({"type": "http", "headers": []}, self.receive)


def test_an_error_after_the_first_byte_ends_the_stream_without_done() -> None:
    async def chunks() -> AsyncGenerator[Chunks, None]:
        yield [{"a": 1}, {"a": 2}]
        raise EngineDeadError("gone")

    async def scenario() -> None:
        client = Client()
        response = await event_stream(client.request(), chunks())
        await response({}, client.receive, client.send)
        assert client.is_complete
        lines = client.received.decode().split("\n\n")
        assert lines[:2] == ['data: {"a":1}', 'data: {"a":2}']
        assert json.loads(lines[2].removeprefix("data: "))["error"]["code"] == "engine_dead"
        assert lines[3:] == [""]

    asyncio.run(scenario())


def test_an_event_that_cannot_be_written_is_told_by_who_made_it() -> None:
    async def chunks() -> AsyncGenerator[Chunks, None]:
        try:
            yield [{"type": "begin"}]
            yield [{"type": "text", "text": "\ud800"}]
        except ValueError:
            yield [{"type": "error"}]

    async def scenario() -> None:
        client = Client()
        response = await named_event_stream(client.request(), chunks())
        await response({}, client.receive, client.send)
        assert client.is_complete
        kinds = [event.split("\n")[0] for event in client.received.decode().split("\n\n")]
        assert kinds == ["event: begin", "event: error", ""]

    asyncio.run(scenario())


def test_an_unforeseen_error_tells_the_client_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def chunks() -> AsyncGenerator[Chunks, None]:
        yield [{"a": 1}]
        raise ValueError("secret /path")

    async def scenario() -> None:
        client = Client()
        response = await event_stream(client.request(), chunks())
        await response({}, client.receive, client.send)
        assert b"secret" not in client.received
        assert b"internal_error" in client.received

    asyncio.run(scenario())
    assert "secret /path" in caplog.text


def test_an_error_before_the_first_byte_is_raised() -> None:
    async def chunks() -> AsyncGenerator[Chunks, None]:
        if True:
            raise EngineDeadError("gone")
        yield []

    with pytest.raises(EngineDeadError):
        asyncio.run(_first(chunks()))


async def _first(chunks: AsyncGenerator[Chunks, None]) -> None:
    await event_stream(Client().request(), chunks)


@pytest.mark.parametrize("when", ["before the first byte", "in the middle"])
def test_a_client_that_leaves_closes_the_producer(when: str) -> None:
    async def scenario() -> None:
        is_closed = False
        client = Client()

        async def chunks() -> AsyncGenerator[Chunks, None]:
            nonlocal is_closed
            try:
                if when == "in the middle":
                    yield [{"a": 1}]
                client.leaves.set()
                await asyncio.Event().wait()
                yield []
            finally:
                await asyncio.sleep(0)
                is_closed = True

        if when == "in the middle":
            response = await event_stream(client.request(), chunks())
            await response({}, client.receive, client.send)
            assert client.received == b'data: {"a":1}\n\n'
        else:
            with pytest.raises(ClientGoneError):
                await event_stream(client.request(), chunks())
        assert is_closed
        assert not client.is_complete

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_a_client_that_leaves_without_having_read_closes_the_producer() -> None:
    async def scenario() -> None:
        is_closed = False

        async def events() -> AsyncGenerator[bytes, None]:
            nonlocal is_closed
            try:
                while True:
                    yield b"data: 1\n\n"
            finally:
                is_closed = True

        client = Client(reads=False)
        answer = asyncio.ensure_future(EventStream(events())({}, client.receive, client.send))
        while not client.received:
            await asyncio.sleep(0)
        client.leaves.set()
        await answer
        assert is_closed
        assert client.received == b"data: 1\n\n"

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_work_is_cancelled_when_the_client_leaves() -> None:
    async def scenario() -> None:
        client = Client()
        was_cancelled = False

        async def work() -> None:
            nonlocal was_cancelled
            try:
                client.leaves.set()
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                was_cancelled = True
                raise

        with pytest.raises(ClientGoneError):
            await while_connected(client.request(), work())
        assert was_cancelled

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_work_that_misses_its_cancellation_is_cancelled_again() -> None:
    """As `asyncio.wait_for` did up to Python 3.11, when what it waited for ended just then."""

    async def scenario() -> None:
        client = Client()

        async def work() -> None:
            with suppress(asyncio.CancelledError):
                client.leaves.set()
                await asyncio.Event().wait()
            await asyncio.Event().wait()

        with pytest.raises(ClientGoneError):
            await while_connected(client.request(), work())

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_progress_gives_each_thing_once() -> None:
    progress = Progress()
    first = progress.advance(CompletionOutput(0, "ab", [1, 2]))
    assert (first.text, first.token_ids, first.finish_reason) == ("ab", [1, 2], None)
    last = progress.advance(CompletionOutput(0, "abc", [1, 2, 3], finish_reason="stop", stop_reason="x"))
    assert (last.text, last.token_ids, last.finish_reason, last.stop_reason) == ("c", [3], "stop", "x")
    again = progress.advance(CompletionOutput(0, "abc", [1, 2, 3], finish_reason="stop", stop_reason="x"))
    assert not again.is_shown
    assert again.finish_reason is None
