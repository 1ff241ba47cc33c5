"""Sending requests, with what `qengine bench serve` sends them with; and what came of those that were refused."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from benchmarks.common import BenchmarkError
from benchmarks.serving.servers import Server
from qengine.bench.figures import Outcome
from qengine.bench.generator import run_load
from qengine.bench.load import LoadRequest, random_load
from qengine.bench.wire import stream_completion
from qengine.client.api import ServerError

#: Ids below this are in every vocabulary of interest, and those of the bundled model's that are no special tokens.
VOCAB_SIZE = 10_000
_TEXT = re.compile(rb'"text":"[^"]')
_READ_BYTES = 65536
_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Refusal:
    """What an answer other than 200 said; None where there was no answer, or no such header."""

    status: int | None
    retry_after: str | None


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What became of each request, in order, and of those refused by their number; CPU seconds of the server."""

    outcomes: list[Outcome]
    refusals: dict[int, Refusal]
    cpu_seconds: float

    @property
    def num_tokens(self) -> int:
        return sum(outcome.num_tokens for outcome in self.outcomes)

    @property
    def seconds(self) -> float:
        """From the first request to the last end."""
        return max(o.end_s for o in self.outcomes) - min(o.sent_s for o in self.outcomes)

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds

    def check(self) -> LoadResult:
        """Itself. Raises BenchmarkError if a request failed."""
        failed = [outcome.error for outcome in self.outcomes if outcome.error is not None]
        if failed:
            raise BenchmarkError(f"{len(failed)} of {len(self.outcomes)} requests failed: {failed[0]}")
        return self


def requests_of(num_requests: int, input_len: int, output_len: int, seed: int) -> list[LoadRequest]:
    """Prompts that share no beginning, the same for the same seed."""
    return random_load(num_requests, input_len, output_len, VOCAB_SIZE, seed)


def send(server: Server, requests: Sequence[LoadRequest], due_s: Sequence[float] | None = None) -> LoadResult:
    """Send each request when it is due, or all at once, and wait for all answers."""
    refusals: dict[int, Refusal] = {}
    numbers = {id(request): number for number, request in enumerate(requests)}

    async def stream(request: LoadRequest) -> AsyncGenerator[Mapping[str, Any], None]:
        try:
            async with aclosing(stream_completion(server.address, None, request.body(server.model))) as chunks:
                async for chunk in chunks:
                    yield chunk
        except ServerError as error:
            refusals[numbers[id(request)]] = Refusal(error.status, error.retry_after)
            raise

    cpu_began = server.cpu_seconds()
    outcomes = asyncio.run(run_load(requests, due_s or [0.0] * len(requests), stream, clock=time.perf_counter))
    return LoadResult(outcomes, refusals, server.cpu_seconds() - cpu_began)


def time_to_first_text(server: Server, request: LoadRequest) -> float | None:
    """Seconds from connecting to the first text of one streamed answer, which is awaited to its end; None without text.

    A plain socket that does nothing but wait: the client's own work is not what is measured.

    Raises:
        BenchmarkError: if the answer is not a good one.
    """
    host, port = server.address.host, server.address.port
    payload = json.dumps(request.body(server.model)).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
    )
    received, first_s = b"", None
    began = time.perf_counter()
    try:
        with socket.create_connection((host, port), timeout=_TIMEOUT_S) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(head.encode() + payload)
            while data := connection.recv(_READ_BYTES):
                received += data
                if first_s is None and _TEXT.search(received):
                    first_s = time.perf_counter() - began
    except OSError as error:
        raise BenchmarkError(f"a request for its first text failed: {error}") from error
    if b" 200 " not in received.partition(b"\r\n")[0] or b"data: [DONE]" not in received:
        raise BenchmarkError(f"a request for its first text was answered with {received[:200]!r}")
    return first_s
