"""What the kernel is told about each connection."""

from __future__ import annotations

import socket

from qengine.serving.http_server import set_options
from qengine.serving.limits import LIMITS


def test_small_writes_go_out_at_once_and_vanished_peers_are_noticed() -> None:
    # As the server makes it: asyncio leaves accepted sockets of such a listener alone.
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            set_options(connection)
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            # The kernel doubles what it is given, for its own books.
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) <= 2 * LIMITS.send_buffer_bytes


def test_unix_sockets_have_none_of_tcps() -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        set_options(connection)
