"""`qengine bench serve`: load a server with requests that arrive at random, and say how it kept up.

Invariant: a server that this command started is stopped before it returns, however it returns; the load generator and
the server are different processes, so that one does not slow the other but by the cores they share.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from qengine import __version__, environment
from qengine.bench.figures import summarize
from qengine.bench.generator import run_load
from qengine.bench.load import LoadRequest, arrival_times, file_load, random_load
from qengine.bench.report import draw, table
from qengine.bench.wire import stream_completion
from qengine.client.address import parse_address
from qengine.client.api import ApiClient
from qengine.commands.bench_settings import BenchServeSettings
from qengine.commands.settings import Remote
from qengine.errors import ConfigError, QEngineError

_STOP_SECONDS = 40.0
_ADDRESS = re.compile(r"^\s*address\s+(http\S+)$")


def run(settings: BenchServeSettings) -> int:
    """Measure every rate, print, and write what was asked for. Returns 1 if requests failed, else 0.

    Raises:
        QEngineError: no server, no model of that name, or not one request that works.
    """
    with _server(settings) as remote:
        names = ApiClient(remote.address, remote.api_key).model_names()
        if remote.model is not None and remote.model not in names:
            raise ConfigError(f"{remote.address} has no model '{remote.model}'; it has: {', '.join(names[:20])}")
        model = remote.model or names[0]
        loads = [_load(settings, number) for number in range(len(settings.rates))]
        print(f"{model} at {remote.address}: {settings.num_prompts} requests per rate", file=sys.stderr)
        points = [
            asyncio.run(_measure(settings, remote, model, load, rate))
            for load, rate in zip(loads, settings.rates, strict=True)
        ]
    print(table(points, settings.bounds_ms), end="")
    _write(settings, model, str(remote.address), points)
    return 1 if any(point["errors"] for point in points) else 0


def _load(settings: BenchServeSettings, number: int) -> list[LoadRequest]:
    """The requests of the rate with this number. Random prompts are new ones each time: none is in a prefix cache."""
    if settings.dataset is not None:
        return file_load(settings.dataset, settings.num_prompts, settings.output_len)
    lengths = (settings.input_len, settings.output_len)
    return random_load(settings.num_prompts, *lengths, settings.vocab_size, settings.seed + 1 + number)


async def _measure(
    settings: BenchServeSettings, remote: Remote, model: str, requests: list[LoadRequest], rate: float
) -> dict[str, Any]:
    """The figures of one rate, after one request that does not count."""

    def send(request: LoadRequest) -> AsyncGenerator[Mapping[str, Any], None]:
        return stream_completion(remote.address, remote.api_key, request.body(model))

    [warm_up] = await run_load(random_load(1, 8, 2, settings.vocab_size, settings.seed), [0.0], send)
    if warm_up.error is not None:
        raise QEngineError(f"a first request failed, nothing was measured: {warm_up.error}")
    due_s = arrival_times(len(requests), rate, settings.seed)
    return summarize(rate, await run_load(requests, due_s, send), settings.bounds_ms)


def _write(settings: BenchServeSettings, model: str, address: str, points: list[dict[str, Any]]) -> None:
    if settings.json_file is not None:
        record = {
            "benchmark": "serve",
            "qengine": __version__,
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "model": model,
            "address": address,
            "num_prompts": settings.num_prompts,
            "input_len": settings.input_len if settings.dataset is None else None,
            "output_len": settings.output_len,
            "dataset": None if settings.dataset is None else settings.dataset.name,
            "seed": settings.seed,
            "goodput_bounds_ms": dict(settings.bounds_ms),
            "points": points,
        }
        settings.json_file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if settings.chart_file is not None:
        draw(settings.chart_file, points, settings.bounds_ms, f"{model}, {settings.num_prompts} requests per rate")


@contextmanager
def _server(settings: BenchServeSettings) -> Iterator[Remote]:
    """The server to load: the one that was named, or one of our own for the time of the context."""
    if settings.remote is not None:
        yield settings.remote
        return
    words = [sys.executable, "-m", "qengine", "serve", *settings.serve_words, "--port", "0"]
    # Its own process group, so that Ctrl-C comes to us alone and we end it in good order.
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            yield Remote(parse_address(_address_of(process)), environment.api_key())
        finally:
            _stop(process)


def _address_of(process: subprocess.Popen[str]) -> str:
    """What the server prints when it is ready. Raises QEngineError if it ends instead."""
    assert process.stdout is not None
    for line in process.stdout:
        found = _ADDRESS.match(line)
        if found is not None:
            return found[1]
    raise QEngineError(f"the server ended with code {process.wait()} before it was ready; what it said is above")


def _stop(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
