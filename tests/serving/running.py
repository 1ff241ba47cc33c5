"""A server on a free port of this machine, in threads, for the time of a `with` block."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from qengine.config import CacheConfig
from qengine.serving.app import make_app
from qengine.serving.async_engine import AsyncEngine
from qengine.serving.http_server import HttpServer
from qengine.serving.options import ServerOptions
from qengine.serving.server import make_service, start_serving
from qengine.serving.service import Service
from qengine.serving.sockets import base_url, close_listener, open_listener
from tests.serving.scripted_engine import ScriptedEngine
from tests.waiting import WAIT_SECONDS, wait_until


@dataclass
class Running:
    """A server and the parts it is made of."""

    url: str
    port: int
    service: Service
    async_engine: AsyncEngine | None
    engine: Any

    def client(self, **more: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=WAIT_SECONDS, **more)

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json=body, **more)

    def get(self, path: str, **more: Any) -> httpx.Response:
        with self.client() as client:
            return client.get(path, **more)

    def wait_until_quiet(self) -> None:
        """Until nothing is left in the server of any request."""
        assert self.async_engine is not None
        admission = self.async_engine.admission
        wait_until(lambda: not self.engine.has_unfinished and admission.num_in_flight == 0)


@contextmanager
def watched_loop(server: Running, clock: Callable[[], float] = time.monotonic) -> Iterator[list[float]]:
    """How many seconds the server's event loop took, each time, to come back to somebody who waits 2 ms.

    By `time.process_time` they are seconds that this process computed, however often it was not let to.
    """
    server.post("/v1/completions", {"model": server.service.model_names[0], "prompt": "a", "max_tokens": 1})
    loop = server.async_engine._loop if server.async_engine is not None else None
    assert loop is not None
    lags: list[float] = []
    ended = threading.Event()

    async def watch() -> None:
        while not ended.is_set():
            began = clock()
            await asyncio.sleep(0.002)
            lags.append(clock() - began)

    watching = asyncio.run_coroutine_threadsafe(watch(), loop)
    try:
        yield lags
    finally:
        ended.set()
        watching.result(WAIT_SECONDS)


@contextmanager
def serving(engine: Any, *, tracer: Any = None, **options: Any) -> Iterator[Running]:
    """Serve `engine` (None: still loading). It is shut down at the end."""
    server_options = ServerOptions(port=0, **options)
    listener = open_listener(server_options)
    service = make_service(server_options)
    http = HttpServer(make_app(service, server_options), listener, server_options, service.monitoring)
    url, port = base_url(listener, server_options), listener.getsockname()[1]
    async_engine = None
    http.start()
    try:
        if engine is not None:
            async_engine = start_serving(engine, service, server_options, CacheConfig(), tracer=tracer)
        yield Running(url, port, service, async_engine, engine)
    finally:
        if isinstance(engine, ScriptedEngine):
            engine.allow()
        if async_engine is not None:
            async_engine.shutdown()
        http.stop()
        close_listener(listener)
