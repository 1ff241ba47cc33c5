"""What is measured but for the overload: each function is one part and returns plain figures for JSON.

Invariant: warm-ups are done before anything counts; what is compared takes turns, so that a bad minute hurts both.
"""

from __future__ import annotations

import itertools
import json
import statistics
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import Any

from benchmarks.common import BenchmarkError, Spread
from benchmarks.serving.load import LoadResult, requests_of, send, time_to_first_text
from benchmarks.serving.probe import watched
from benchmarks.serving.reference import Reference
from benchmarks.serving.servers import Cores, Server
from qengine.bench.figures import percentile

Say = Callable[[str], None]
_WARM_UP_TOKENS = 8
_FIRST_BYTE_TOKENS = 8
_FIRST_BYTE_PROBES = 40
_MEBIBYTE = 2**20


@dataclass(frozen=True, slots=True)
class Shape:
    """Lengths in tokens, and how often everything is run."""

    input_len: int
    output_len: int
    num_runs: int


def _seeds() -> Iterator[int]:
    """Requests of different runs share no prompts: nothing is found in a prefix cache."""
    return itertools.count(1)


def throughput(server: Server, alone: Reference, shape: Shape, num_streams: int, say: Say) -> dict[str, Any]:
    """Tokens per second of `num_streams` requests at once, over HTTP and as a batch of the engine alone.

    CPU time per token says the same where others disturb the machine: it holds still when they take a core's time.
    """
    seeds = _seeds()
    warm_up = requests_of(num_streams, shape.input_len, _WARM_UP_TOKENS, next(seeds))
    alone.run(warm_up)
    send(server, warm_up).check()
    served: list[float] = []
    batch: list[float] = []
    served_cpu: list[float] = []
    batch_cpu: list[float] = []
    for run in range(shape.num_runs):
        requests = requests_of(num_streams, shape.input_len, shape.output_len, next(seeds))
        reading = alone.run(requests)
        batch.append(reading.num_tokens / reading.seconds)
        batch_cpu.append(reading.cpu_seconds / reading.num_tokens)
        result = send(server, requests).check()
        _check_work(result.num_tokens, reading.num_tokens)
        served.append(result.tokens_per_s)
        served_cpu.append(result.cpu_seconds / result.num_tokens)
        say(f"run {run + 1}: served {served[-1]:.1f}, batch {batch[-1]:.1f} tok/s")
    return {
        "num_streams": num_streams,
        "served_tokens_per_s": Spread.of(served).to_json(),
        "batch_tokens_per_s": Spread.of(batch).to_json(),
        "ratio": Spread.of([s / b for s, b in zip(served, batch, strict=True)]).to_json(),
        "served_cpu_s_per_token": Spread.of(served_cpu).to_json(),
        "batch_cpu_s_per_token": Spread.of(batch_cpu).to_json(),
        "cpu_ratio": Spread.of([b / s for s, b in zip(served_cpu, batch_cpu, strict=True)]).to_json(),
    }


def _check_work(served: int, batch: int) -> None:
    if served != batch:
        raise BenchmarkError(f"the server gave {served} tokens and the engine alone {batch}: not the same work")


def inter_token(server: Server, shape: Shape, num_streams: int, say: Say) -> dict[str, Any]:
    """Times between the pieces of each of `num_streams` answers, in milliseconds."""
    seeds = _seeds()
    send(server, requests_of(num_streams, shape.input_len, _WARM_UP_TOKENS, next(seeds))).check()
    medians: list[float] = []
    tails: list[float] = []
    for run in range(shape.num_runs):
        requests = requests_of(num_streams, shape.input_len, shape.output_len, next(seeds))
        gaps = [gap * 1000 for outcome in send(server, requests).check().outcomes for gap in outcome.gaps_s]
        medians.append(percentile(gaps, 50))
        tails.append(percentile(gaps, 99))
        say(f"run {run + 1}: p50 {medians[-1]:.1f}, p99 {tails[-1]:.1f} ms")
    return {
        "num_streams": num_streams,
        "p50_ms": Spread.of(medians).to_json(),
        "p99_ms": Spread.of(tails).to_json(),
        "ratio": Spread.of([p99 / p50 for p50, p99 in zip(medians, tails, strict=True)]).to_json(),
    }


def first_byte(server: Server, alone: Reference, shape: Shape, say: Say) -> dict[str, Any]:
    """Until the first text of a single request: over HTTP with a new connection each time, and of the engine alone.

    Both are told by what does nothing else: a plain socket, and a loop around the engine's steps.
    """
    seeds = _seeds()
    served: list[float] = []
    direct: list[float] = []
    for number in range(_FIRST_BYTE_PROBES + 2):
        requests = requests_of(1, shape.input_len, _FIRST_BYTE_TOKENS, next(seeds))
        reading = alone.run(requests)
        ttft = time_to_first_text(server, requests[0])
        # Random tokens may make no text at all; then there is nothing to compare. The first two warm up.
        if number >= 2 and ttft is not None and reading.first_text_s:
            served.append(ttft * 1000)
            direct.append(reading.first_text_s * 1000)
    if not served:
        raise BenchmarkError("no request for its first text got any")
    overheads = [a - b for a, b in zip(served, direct, strict=True)]
    say(f"{len(overheads)} requests: {statistics.median(overheads):.1f} ms more than the engine alone")
    return {
        "num_requests": len(overheads),
        "served_p50_ms": statistics.median(served),
        "engine_p50_ms": statistics.median(direct),
        "overhead_p50_ms": statistics.median(overheads),
    }


def responsiveness(server: Server, shape: Shape, cores: Cores, num_streams: int, say: Say) -> dict[str, Any]:
    """How soon /health answers while streams run, and while 1 MiB of text goes to /tokenize over and over as well."""
    seeds = _seeds()
    send(server, requests_of(num_streams, shape.input_len, _WARM_UP_TOKENS, next(seeds))).check()

    def streams() -> LoadResult:
        return send(server, requests_of(num_streams, shape.input_len, shape.output_len, next(seeds))).check()

    with watched(server, cores.load) as plain:
        for _ in range(shape.num_runs):
            streams()
    say(f"streams: {_latency_text(plain)}")
    figures: dict[str, Any] = {"num_streams": num_streams, "streams_ms": _latency(plain), "tokenize_ms": None}
    if not _has_tokenize(server):
        return {**figures, "tokenize_problem": "this server has no /tokenize"}
    with watched(server, cores.load) as beside, _tokenizing(server) as statuses:
        for _ in range(shape.num_runs):
            streams()
    say(f"with /tokenize: {_latency_text(beside)}")
    return {**figures, "tokenize_ms": _latency(beside), "tokenize_statuses": sorted(set(statuses))}


def _latency(seconds: list[float]) -> dict[str, float]:
    found = {f"p{percent}": percentile(seconds, percent) * 1000 for percent in (50, 99)}
    return {"num": len(seconds), **found, "max": max(seconds) * 1000}


def _latency_text(seconds: list[float]) -> str:
    found = _latency(seconds)
    return f"/health p50 {found['p50']:.1f}, p99 {found['p99']:.1f}, max {found['max']:.1f} ms"


def _has_tokenize(server: Server) -> bool:
    return _tokenize(server, "Hello") == 200


def _tokenize(server: Server, text: str) -> int:
    """The status of POST /tokenize."""
    connection = HTTPConnection(server.address.host, server.address.port, timeout=120)
    try:
        body = json.dumps({"model": server.model, "prompt": text}).encode()
        connection.request("POST", "/tokenize", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read()
        return response.status
    finally:
        connection.close()


class _tokenizing:  # noqa: N801 - used as a function
    """Sends 1 MiB of text to /tokenize, again and again from a thread, while the context is open."""

    def __init__(self, server: Server) -> None:
        words = " ".join(f"word{number} and" for number in range(100_000))
        self._server, self._text = server, words[:_MEBIBYTE]
        self._stop = threading.Event()
        self._statuses: list[int] = []
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._statuses.append(_tokenize(self._server, self._text))

    def __enter__(self) -> list[int]:
        self._thread.start()
        return self._statuses

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def side_by_side(own: Server, peer: Server, shape: Shape, num_streams: int, say: Say) -> dict[str, Any]:
    """Tokens per second of two servers under the same load, in turns."""
    seeds = _seeds()
    for server in (own, peer):
        send(server, requests_of(num_streams, shape.input_len, _WARM_UP_TOKENS, next(seeds))).check()
    ours: list[float] = []
    theirs: list[float] = []
    for run in range(shape.num_runs):
        requests = requests_of(num_streams, shape.input_len, shape.output_len, next(seeds))
        ours.append(send(own, requests).check().tokens_per_s)
        theirs.append(send(peer, requests).check().tokens_per_s)
        say(f"run {run + 1}: {own.name} {ours[-1]:.1f}, {peer.name} {theirs[-1]:.1f} tok/s")
    return {
        "num_streams": num_streams,
        "own_tokens_per_s": Spread.of(ours).to_json(),
        "peer_tokens_per_s": Spread.of(theirs).to_json(),
        "ratio": Spread.of([a / b for a, b in zip(ours, theirs, strict=True)]).to_json(),
    }
