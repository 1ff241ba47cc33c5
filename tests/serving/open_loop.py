"""An open-loop load on a server in another process: requests go out when they are due, whatever becomes of others."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from tests.serving.bad_rows import TEXT

#: An answer that takes longer counts as none.
SECONDS = 120.0


@dataclass(frozen=True)
class Shot:
    """One request: its body, and whether its client leaves after the first event."""

    body: Any
    leaves: bool = False


@dataclass(frozen=True)
class Result:
    """What became of a request. Times in seconds: since the start of the load, and since it was due.

    `status` is 0 where there was no answer, `first` the time to the first event; `is_whole` says that a stream ended as
    it should.
    """

    due: float
    status: int
    first: float | None
    took: float
    is_whole: bool
    headers: httpx.Headers | None = None


def poisson(rate: float, seconds: float, draw: random.Random) -> Iterator[float]:
    """When requests are due."""
    due = draw.expovariate(rate)
    while due < seconds:
        yield due
        due += draw.expovariate(rate)


async def run_load(url: str, due: list[float], make: Callable[[int], Shot]) -> list[Result]:
    """Send `make(index)` when it is due."""
    begin = time.monotonic()
    # The generator keeps no connection waiting for another request, and never waits for one.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(base_url=url, timeout=SECONDS, limits=limits) as client:
        tasks = []
        for index, moment in enumerate(due):
            await asyncio.sleep(max(0.0, begin + moment - time.monotonic()))
            tasks.append(asyncio.ensure_future(_send(client, make(index), begin, moment)))
        return list(await asyncio.gather(*tasks))


async def _send(client: httpx.AsyncClient, shot: Shot, begin: float, due: float) -> Result:
    first, last, status, headers = None, "", 0, None
    try:
        async with client.stream("POST", TEXT, json=shot.body) as response:
            status, headers = response.status_code, response.headers
            async for line in response.aiter_lines():
                if line:
                    first = first or time.monotonic() - begin - due
                    last = line
                    if shot.leaves:
                        break
    except httpx.HTTPError:
        pass
    return Result(due, status, first, time.monotonic() - begin - due, last == "data: [DONE]", headers)


async def capacity(url: str, body: Any, seconds: float, num_clients: int) -> float:
    """Requests per second that so many clients get answered who each wait for their answer."""
    end = time.monotonic() + seconds
    num_answered = 0

    async def ask(client: httpx.AsyncClient) -> None:
        nonlocal num_answered
        while time.monotonic() < end:
            (await client.post(TEXT, json={**body, "stream": False})).raise_for_status()
            num_answered += 1

    async with httpx.AsyncClient(base_url=url, timeout=SECONDS) as client:
        await asyncio.gather(*(ask(client) for _ in range(num_clients)))
    return num_answered / seconds


def percentile(values: list[float], share: float) -> float:
    """The value below which that share of them lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def slope(times: list[float], values: list[float]) -> float:
    """Of the straight line through the points, by least squares."""
    middle, mean = sum(times) / len(times), sum(values) / len(values)
    above = sum((t - middle) * (v - mean) for t, v in zip(times, values, strict=True))
    return above / sum((t - middle) ** 2 for t in times)


def shown(**figures: Any) -> str:
    return json.dumps({name: round(v, 4) if isinstance(v, float) else v for name, v in figures.items()})
