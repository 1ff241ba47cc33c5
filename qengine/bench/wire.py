"""One streamed completion over asyncio, as lean as it can be: the generator must not be what is measured.

Invariant: every piece is stamped as soon as its bytes are here. A failure of the server or the connection is raised as
QEngineError; the connection is closed in every case.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import h11

from qengine.client.address import Address
from qengine.client.api import ServerError
from qengine.client.events import DONE, EventParser, StreamError, error_message, parse_chunk

_READ_BYTES = 65536
_CONNECT_SECONDS = 30.0


async def stream_completion(
    address: Address, api_key: str | None, body: Mapping[str, Any]
) -> AsyncGenerator[Mapping[str, Any], None]:
    """Chunks of one completion as they come. Raises ServerError or StreamError."""
    parser = EventParser()
    async with aclosing(_answer(address, api_key, body)) as received:
        async for data in received:
            for event in parser.feed(data):
                if event == DONE:
                    return
                yield parse_chunk(event)
    raise StreamError("the stream ended before the answer was complete")


async def _answer(address: Address, api_key: str | None, body: Mapping[str, Any]) -> AsyncGenerator[bytes, None]:
    """The body of a good answer, as it comes."""
    try:
        reader, writer = await asyncio.wait_for(_connect(address), _CONNECT_SECONDS)
    except (OSError, asyncio.TimeoutError) as error:
        raise ServerError(f"cannot connect to {address}: {getattr(error, 'strerror', None) or 'no answer'}") from error
    try:
        connection = h11.Connection(h11.CLIENT)
        payload = json.dumps(body).encode()
        writer.write(_request(connection, address, api_key, payload))
        status = 0
        retry_after: str | None = None
        refusal = b""
        async for event in _events(connection, reader):
            if isinstance(event, h11.Response):
                status = event.status_code
                retry_after = next((value.decode() for name, value in event.headers if name == b"retry-after"), None)
            elif isinstance(event, h11.Data):
                if status == 200:
                    yield bytes(event.data)
                else:
                    refusal += bytes(event.data)
        if status != 200:
            raise ServerError(_reason(status, refusal), status, retry_after)
    except (OSError, h11.ProtocolError) as error:
        raise StreamError(f"the connection failed: {type(error).__name__}") from error
    finally:
        writer.close()


async def _connect(address: Address) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    context = ssl.create_default_context() if address.is_secure else None
    return await asyncio.open_connection(address.host, address.port, ssl=context)


def _request(connection: h11.Connection, address: Address, api_key: str | None, payload: bytes) -> bytes:
    headers = [
        ("Host", f"{address.host}:{address.port}"),
        ("Content-Type", "application/json"),
        ("Content-Length", str(len(payload))),
        ("Connection", "close"),
    ]
    if api_key:
        headers.append(("Authorization", f"Bearer {api_key}"))
    request = h11.Request(method="POST", target=address.path("/v1/completions"), headers=headers)
    parts = [connection.send(request), connection.send(h11.Data(data=payload)), connection.send(h11.EndOfMessage())]
    return b"".join(part for part in parts if part is not None)


async def _events(connection: h11.Connection, reader: asyncio.StreamReader) -> AsyncGenerator[h11.Event, None]:
    """What h11 makes of the bytes, until the message ends."""
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(_READ_BYTES))
        elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed) or event is h11.PAUSED:
            return
        else:
            assert isinstance(event, h11.Event)
            yield event


def _reason(status: int, body: bytes) -> str:
    try:
        message = error_message(json.loads(body))
    except ValueError:
        message = None
    return f"status {status}: {message[:200] if message else 'no reason given'}"
