"""Answers that take a while: server-sent events, and noticing that the client went away.

Invariants: whatever produces an answer is cancelled as soon as its client has gone, streaming or not, and is always
closed; a stream of unnamed events ends with ``data: [DONE]`` exactly when it is complete. Producers are asynchronous
generators whose closing frees what they hold; what they produce is not this module's business, nor are clients that do
not read: http_server drops them.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from qengine.serving.body import ClientGoneError
from qengine.serving.errors import as_api_error

#: Chunks that one engine output makes; they leave in one write.
Chunks = Sequence[Mapping[str, Any]]
_T = TypeVar("_T")
_DONE = b"data: [DONE]\n\n"
#: Longer than most tasks need to let go; one that is still there then may have missed it.
_CANCEL_SECONDS = 0.2
#: Made once: json.dumps makes one for each call that is not plain, which costs more than a token's chunk does.
_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


async def while_connected(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """The result of `work`, which is cancelled if the client leaves first. The body must have been read.

    Raises:
        ClientGoneError: the client left.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_wait_until_gone(request.receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        await _cancel(working, leaving)


async def event_stream(request: Request, chunks: AsyncGenerator[Chunks, None]) -> Response:
    """The response that sends `chunks` as server-sent events.

    Waits for the first ones, so that a request that is refused still gets its own status.

    Raises:
        ClientGoneError: the client left before. Anything that `chunks` raises before its first item.
    """
    return EventStream(_events(await while_connected(request, _first(chunks)), chunks))


async def named_event_stream(request: Request, chunks: AsyncGenerator[Chunks, None]) -> Response:
    """The same for an API whose events have names: each chunk's "type". They tell of the end and of errors themselves.

    Raises:
        ClientGoneError, and what `chunks` raises: as `event_stream`.
    """
    return EventStream(_named_events(await while_connected(request, _first(chunks)), chunks))


async def _first(chunks: AsyncGenerator[Chunks, None]) -> Chunks:
    return await anext(chunks)


async def _named_events(first: Chunks, chunks: AsyncGenerator[Chunks, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(chunks):
        batch: Chunks | None = first
        while batch is not None:
            try:
                data = _encode_named(batch)
            except ValueError as error:  # Who made it tells of it, in the words of its API.
                data = _encode_named(await chunks.athrow(error))
            yield data
            batch = await anext(chunks, None)


async def _events(first: Chunks, chunks: AsyncGenerator[Chunks, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(chunks):
        try:
            yield _encode(first)
            async for more in chunks:
                yield _encode(more)
        except Exception as error:  # noqa: BLE001 - the status is sent: the stream itself must carry any error
            yield _encode([as_api_error(error).body()])
            return
        yield _DONE


def _encode(chunks: Chunks) -> bytes:
    return "".join([f"data: {_JSON.encode(chunk)}\n\n" for chunk in chunks]).encode()


def _encode_named(chunks: Chunks) -> bytes:
    return "".join([f"event: {chunk['type']}\ndata: {_JSON.encode(chunk)}\n\n" for chunk in chunks]).encode()


class EventStream(StreamingResponse):
    """Sends events until they end or the client leaves. One that does not read is made to leave by http_server."""

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send_all(send))
        leaving = asyncio.ensure_future(_wait_until_gone(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            await _cancel(sending, leaving)
            await self._events.aclose()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    """Cancel `tasks` and wait until each has let go of what it held.

    Again and again: up to Python 3.11, one that comes just as a `wait_for` ends is lost.
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=_CANCEL_SECONDS)
    await asyncio.gather(*tasks, return_exceptions=True)
