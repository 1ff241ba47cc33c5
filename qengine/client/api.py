"""A blocking client for one server: its models, and a chat answer as it comes.

Invariant: one connection per call, closed when the call or its iterator ends, however it ends; what goes wrong is a
ServerError that says which server and what to do. The key is sent as a header and never shown.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

from qengine.client.address import Address
from qengine.client.events import DONE, EventParser, StreamError, error_message, parse_chunk
from qengine.errors import QEngineError

_CONNECT_SECONDS = 10.0
#: A token may take long on a busy machine, but not this long.
_READ_SECONDS = 600.0
_READ_BYTES = 65536


class ServerError(QEngineError):
    """The server cannot be reached or refuses.

    Attributes:
        status: its HTTP status, None if there was no answer.
        retry_after: what its header of that name says, None if there is none.
    """

    def __init__(self, message: str, status: int | None = None, retry_after: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


class ApiClient:
    """Calls the server at `address`, with `api_key` if there is one."""

    def __init__(self, address: Address, api_key: str | None = None) -> None:
        self.address = address
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def model_names(self) -> list[str]:
        """What the server calls its models. Raises ServerError."""
        with self._answer("GET", "/v1/models") as response:
            found = _json_of(response.read())
        data = found.get("data") if isinstance(found, dict) else None
        names = [item["id"] for item in data or () if isinstance(item, dict) and isinstance(item.get("id"), str)]
        if not names:
            raise ServerError(f"{self.address} lists no models at /v1/models; is it an OpenAI-compatible server?")
        return names

    def stream_chat(self, body: Mapping[str, Any]) -> Generator[Mapping[str, Any], None, None]:
        """Chunks of the answer to `body` as they come. Raises ServerError or StreamError."""
        sent = {**body, "stream": True, "stream_options": {"include_usage": True}}
        parser = EventParser()
        with self._answer("POST", "/v1/chat/completions", sent) as response:
            while received := response.read1(_READ_BYTES):
                for data in parser.feed(received):
                    if data == DONE:
                        return
                    yield parse_chunk(data)
        raise StreamError("the connection ended before the answer was complete")

    @contextmanager
    def _answer(self, method: str, route: str, body: Any = None) -> Iterator[http.client.HTTPResponse]:
        """The answer to one request, if it is a good one."""
        headers = dict(self._headers)
        payload = None
        if body is not None:
            payload = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        with closing(self._connection()) as connection:
            try:
                connection.connect()
                connection.sock.settimeout(_READ_SECONDS)
                connection.request(method, self.address.path(route), payload, headers)
                with closing(connection.getresponse()) as response:
                    if response.status != 200:
                        raise self._refusal(response)
                    yield response
            except (OSError, http.client.HTTPException) as error:
                raise ServerError(self._lost(error)) from error

    def _connection(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self.address.is_secure else http.client.HTTPConnection
        return kind(self.address.host, self.address.port, timeout=_CONNECT_SECONDS)

    def _lost(self, error: Exception) -> str:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return f"cannot talk to {self.address}: {reason}; is the server running there?"

    def _refusal(self, response: http.client.HTTPResponse) -> ServerError:
        message = error_message(_json_of(response.read(_READ_BYTES)))
        said = message or f"status {response.status} {response.reason}"
        hints = {
            401: "give the key with QENGINE_API_KEY or --api-key",
            429: f"it is busy; try again{_after(response)}",
            503: f"it is not ready; try again{_after(response)}",
        }
        hint = hints.get(response.status)
        return ServerError(f"the server says: {said}" + (f" ({hint})" if hint else ""), response.status)


def _after(response: http.client.HTTPResponse) -> str:
    seconds = response.headers.get("Retry-After")
    return f" in {seconds} s" if seconds is not None and seconds.isdecimal() else ""


def _json_of(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None
