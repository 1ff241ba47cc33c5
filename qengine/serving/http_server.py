"""The HTTP server in its own thread, so that the main thread is free to load a model and to hear signals.

Invariant: once `start` has returned, every connection is answered, if only with 503; after `stop` the thread is gone.
No client can hold a connection for ever: a head or body that does not arrive in time, an answer that is not read and a
peer that is gone each end it. Only h11 parses: its buffers can be bounded.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from qengine.errors import ConfigError, QEngineError
from qengine.serving.errors import ApiError, error_response, unavailable
from qengine.serving.limits import LIMITS
from qengine.serving.metrics.exposition import Monitoring
from qengine.serving.options import ServerOptions

logger = logging.getLogger(__name__)

_KEEP_ALIVE_SECONDS = 75
_FLUSH_SECONDS = 5
_START_POLL_SECONDS = 0.01
#: Time that the application has to answer a late body with 408 before its connection is closed without a word.
_GRACE_SECONDS = 1.0
#: Connections beyond the limit that are answered at the same time; others are closed.
_MAX_REFUSALS = 256


class _Deadline:
    """A timer that runs from its first `start` on, however often it is started again, until `stop`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, action: Callable[[], None]) -> None:
        self._loop = loop
        self._action = action
        self._timer: asyncio.TimerHandle | None = None

    def start(self, seconds: float) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(seconds, self._act)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _act(self) -> None:
        self._timer = None
        self._action()


class GuardedProtocol(H11Protocol):
    """h11 with absolute deadlines: for the head of each request, for its body, and for a client to read its answer.

    Bytes that trickle in extend none of them. Output that the kernel does not take pauses the sender at once, so no
    stream ever has more than one event here; a client that takes too little of it is dropped.
    """

    monitoring: Monitoring
    num_connections: int

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._head = _Deadline(self.loop, partial(self._close_late, "head"))
        self._body = _Deadline(self.loop, partial(self._close_late, "body"))
        self._unread = _Deadline(self.loop, self._check_reader)
        self._num_unsent = 0
        self._is_refused = len(self.connections) > self.num_connections
        _set_up_socket(transport)
        if self._is_refused:
            self._refuse(len(self.connections) - self.num_connections)
            return
        transport.set_write_buffer_limits(high=0)
        self._watch_request()

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        super().data_received(data)
        self._watch_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_request()  # The next request may have come already, or half of it.

    def connection_lost(self, exc: Exception | None) -> None:
        for deadline in (self._head, self._body, self._unread):
            deadline.stop()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._num_unsent = self.transport.get_write_buffer_size()
        self._unread.start(LIMITS.stalled_stream_seconds)

    def resume_writing(self) -> None:
        self._unread.stop()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP gets an answer in the shape of every other error."""
        self._write_error(ApiError(400, "the request is not valid HTTP, or its head is too large"))
        self.transport.close()

    def _refuse(self, num_too_many: int) -> None:
        """Say that there are too many connections, whatever is asked, and close once the client can have read it."""
        self.monitoring.rejected("connections_full")
        if num_too_many > _MAX_REFUSALS:
            self.transport.abort()
            return
        message = f"the server has {self.num_connections} connections, as many as it holds; try again later"
        self._write_error(unavailable(message, "connections_full"))
        # Closing at once would throw the answer away where the request is still to be read.
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._head.start(_GRACE_SECONDS)

    def _write_error(self, error: ApiError) -> None:
        response = error_response(error, "")
        head = h11.Response(status_code=error.status, headers=[*response.raw_headers, (b"connection", b"close")])
        for event in (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")

    def _watch_request(self) -> None:
        state = self.conn.their_state
        if state is not h11.IDLE:
            self._head.stop()
        elif self._is_fresh or self.conn.trailing_data[0]:
            self._head.start(LIMITS.head_seconds)
        if state is h11.SEND_BODY:
            self._body.start(LIMITS.body_seconds + _GRACE_SECONDS)
        else:
            self._body.stop()

    @property
    def _is_fresh(self) -> bool:
        """Whether there has been no request yet; later the keep-alive timer waits for the next one."""
        return self.cycle is None

    def _close_late(self, part: str) -> None:
        if not self._is_refused:
            self.monitoring.late(part)
        self.transport.abort()

    def _check_reader(self) -> None:
        num_unsent = self.transport.get_write_buffer_size()
        if self._num_unsent - num_unsent >= LIMITS.stalled_stream_bytes:
            self._num_unsent = num_unsent
            self._unread.start(LIMITS.stalled_stream_seconds)
            return
        logger.warning("a client did not read its answer for %g s; dropped", LIMITS.stalled_stream_seconds)
        self.monitoring.stalled()
        self.transport.abort()


def _set_up_socket(transport: asyncio.Transport) -> None:
    """Have the kernel send at once, keep little for a client that does not read, and notice a peer that vanished.

    asyncio sends at once only where a socket names its protocol, which those made by `socket.create_server` do not:
    each answer's body, and each token of a stream, would wait for the client to acknowledge what came before.
    """
    connection = transport.get_extra_info("socket")
    seconds = LIMITS.dead_peer_seconds
    settings = [
        (socket.IPPROTO_TCP, "TCP_NODELAY", 1),
        (socket.SOL_SOCKET, "SO_SNDBUF", LIMITS.send_buffer_bytes),
        (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
        (socket.IPPROTO_TCP, "TCP_KEEPIDLE", seconds),
        (socket.IPPROTO_TCP, "TCP_KEEPINTVL", max(1, seconds // 3)),
        (socket.IPPROTO_TCP, "TCP_KEEPCNT", 3),
        (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", 1000 * seconds),
    ]
    for level, name, value in settings:
        number = getattr(socket, name, None)
        if number is not None:
            with suppress(OSError):  # A unix socket has none of TCP's.
                connection.setsockopt(level, number, value)


class HttpServer:
    """Serves `app` on `listener` from `start` to `stop`.

    Args:
        num_connections: how many are answered at a time; by default as many as the table of limits says.

    Raises:
        ConfigError: the certificate or its key is unusable.
    """

    def __init__(
        self,
        app: ASGIApp,
        listener: socket.socket,
        options: ServerOptions,
        monitoring: Monitoring,
        *,
        num_connections: int | None = None,
    ) -> None:
        held = LIMITS.num_connections if num_connections is None else num_connections
        protocol = type("MonitoredProtocol", (GuardedProtocol,), {"monitoring": monitoring, "num_connections": held})
        config = uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            h11_max_incomplete_event_size=LIMITS.head_bytes,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_FLUSH_SECONDS,
            ssl_keyfile=options.ssl_keyfile,
            ssl_certfile=options.ssl_certfile,
        )
        try:
            config.load()
        except OSError as error:  # ssl.SSLError is one.
            raise ConfigError(f"--ssl-certfile or --ssl-keyfile cannot be used: {error}") from error
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [listener]}, name="qengine-http", daemon=True
        )

    def start(self) -> None:
        """Return when connections are being answered."""
        self._thread.start()
        while not self._server.started:
            self._thread.join(_START_POLL_SECONDS)
            if not self._thread.is_alive():
                raise QEngineError("the HTTP server did not start; the log says why")

    def stop(self) -> None:
        """Take no more connections, let answers be sent for a few seconds, end the thread. Idempotent."""
        self._server.should_exit = True
        if self._thread.ident is not None:
            self._thread.join()
