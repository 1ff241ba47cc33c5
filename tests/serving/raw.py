"""Clients on bare sockets, for what no HTTP library would do."""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

from tests.serving.running import Running
from tests.waiting import WAIT_SECONDS


def request_bytes(path: str, body: dict[str, Any], *headers: str) -> bytes:
    """A whole POST request."""
    content = json.dumps(body).encode()
    lines = (
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
        *headers,
    )
    return "\r\n".join((*lines, "", "")).encode() + content


def connect(server: Running, *, receive_buffer: int | None = None) -> socket.socket:
    """A connection; with a small `receive_buffer` the server soon cannot send any more."""
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(WAIT_SECONDS)
    connection.connect(("127.0.0.1", server.port))
    return connection


def open_request(
    server: Running,
    body: dict[str, Any],
    path: str = "/v1/completions",
    *headers: str,
    receive_buffer: int | None = None,
) -> socket.socket:
    """A connection on which a request was sent."""
    connection = connect(server, receive_buffer=receive_buffer)
    connection.sendall(request_bytes(path, body, *headers))
    return connection


def reset(connection: socket.socket) -> None:
    """Close so that the server gets a RST and not a FIN."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def read_events(connection: socket.socket, num_events: int) -> bytes:
    """At least that many server-sent events, or all there are."""
    received = b""
    while received.count(b"data: ") < num_events and (more := connection.recv(4096)):
        received += more
    return received


def read_all(connection: socket.socket) -> bytes:
    """Everything until the server closes."""
    received = b""
    while more := connection.recv(65536):
        received += more
    return received


def is_closed(connection: socket.socket) -> bool:
    """Whether the server has closed, looked at without waiting; what it sent before is thrown away."""
    connection.setblocking(False)
    try:
        while connection.recv(65536):
            pass
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
    return True
