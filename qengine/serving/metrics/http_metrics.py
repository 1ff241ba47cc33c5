"""Counts HTTP requests as an ASGI layer around everything else.

A layer of our own, because the usual instrumentator runs inside the application, where what the outer layers refuse
(a missing key, a foreign Host) is not seen, and takes its labels from regular expressions over paths.
Invariant: label values are route templates, a fixed list of methods and five classes of status, whatever clients send.
"""

from __future__ import annotations

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qengine.serving.metrics.catalog import HttpMetrics

_UNCOUNTED = frozenset({"/health", "/metrics", "/version"})
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
#: The client left before there was an answer.
_NO_ANSWER = 499


class HttpMetricsLayer:
    """Measures each request of `app` until its answer has ended, however it ends."""

    def __init__(self, app: ASGIApp, metrics: HttpMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _UNCOUNTED:
            await self._app(scope, receive, send)
            return
        watch = _Watch(receive, send)
        try:
            await self._app(scope, watch.receive, watch.send)
        finally:
            self._count(scope, watch)

    def _count(self, scope: Scope, watch: _Watch) -> None:
        route = getattr(scope.get("route"), "path", "none")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        seconds = time.monotonic() - watch.began
        metrics = self._metrics
        with metrics.lock:
            metrics.requests.inc(1, route, method, f"{watch.status // 100}xx")
            metrics.request_bytes.observe(watch.num_received, route)
            metrics.response_bytes.observe(watch.num_sent, route)
            metrics.duration.observe(seconds)
            metrics.duration_by_handler.observe(seconds, route, method)


class _Watch:
    """One request's bytes and status on their way."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self.began = time.monotonic()
        self.status = _NO_ANSWER
        self.num_received = 0
        self.num_sent = 0
        self._receive = receive
        self._send = send

    async def receive(self) -> Message:
        message = await self._receive()
        self.num_received += len(message.get("body", b""))
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)
        self.num_sent += len(message.get("body", b""))
