"""The open-loop generator: every request goes out when it is due, however many are still being answered.

Invariant: no request waits for another one. The clock and the sleep are arguments, so that a test decides what time it
is; the sender is one too, so that no server is needed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from qengine.bench.figures import Outcome
from qengine.bench.load import LoadRequest
from qengine.client.events import num_tokens_of, text_of
from qengine.errors import QEngineError

#: Chunks of the answer to a request, as they come.
Send = Callable[[LoadRequest], AsyncGenerator[Mapping[str, Any], None]]
Clock = Callable[[], float]
Sleep = Callable[[float], Awaitable[None]]


async def run_load(
    requests: Sequence[LoadRequest],
    due_s: Sequence[float],
    send: Send,
    *,
    clock: Clock = time.perf_counter,
    sleep: Sleep = asyncio.sleep,
) -> list[Outcome]:
    """Send each request when it is due; return what became of them, in their order."""
    begin = clock()

    def now() -> float:
        return clock() - begin

    tasks = []
    try:
        for request, due in zip(requests, due_s, strict=True):
            wait_s = due - now()
            if wait_s > 0:
                await sleep(wait_s)
            tasks.append(asyncio.ensure_future(_one(request, due, send, now)))
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


async def _one(request: LoadRequest, due_s: float, send: Send, now: Clock) -> Outcome:
    sent_s = now()
    pieces: list[float] = []
    num_tokens, error = None, None
    try:
        async with aclosing(send(request)) as chunks:
            async for chunk in chunks:
                if text_of(chunk):
                    pieces.append(now())
                num_tokens = num_tokens_of(chunk) or num_tokens
    except QEngineError as problem:
        error = str(problem)
    # A server that counts nothing is taken to send a token per piece.
    count = len(pieces) if num_tokens is None else num_tokens
    return Outcome(due_s, sent_s, tuple(pieces), now(), count, error)
