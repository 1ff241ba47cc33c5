"""The HTTP server in its own thread, so that the main thread is free to load a model and to hear signals.

Invariant: once `start` has returned, every connection is answered, if only with 503; after `stop` the thread is gone.
A connection that does not send a whole request head in time is closed. Only h11 parses: its buffers can be bounded.
"""

from __future__ import annotations

import asyncio
import socket
import threading

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from qengine.errors import ConfigError, QEngineError
from qengine.serving.limits import LIMITS
from qengine.serving.options import ServerOptions

_KEEP_ALIVE_SECONDS = 75
_FLUSH_SECONDS = 5
_START_POLL_SECONDS = 0.01


class DeadlineProtocol(H11Protocol):
    """h11 with an absolute deadline for the head of each request: trickling bytes does not extend it."""

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _watch_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(LIMITS.head_seconds, self._close_late)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _close_late(self) -> None:
        self._head_timer = None
        self.transport.close()


class HttpServer:
    """Serves `app` on `listener` from `start` to `stop`.

    Raises:
        ConfigError: the certificate or its key is unusable.
    """

    def __init__(self, app: ASGIApp, listener: socket.socket, options: ServerOptions) -> None:
        config = uvicorn.Config(
            app,
            http=DeadlineProtocol,
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
