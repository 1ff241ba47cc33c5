"""A server under more than it can answer, and one under load for long: `make test-long`.

What is asserted of times is loose, since a test is no measurement; the figures are printed.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from qengine.grammars.trial import NUM_PROCESSES
from tests.serving.open_loop import Result, Shot, capacity, percentile, poisson, run_load, shown, slope
from tests.serving.rank_server import FIXTURE, RankServer, rank_server
from tests.waiting import wait_until

pytestmark = pytest.mark.long

SOAK_MINUTES = float(os.environ.get("SOAK_MINUTES") or 20)
#: Memory settles in the first part of a soak: caches fill, allocators learn their sizes.
WARM_UP_MINUTES = min(5.0, SOAK_MINUTES / 2)
SAMPLE_SECONDS = 2.0
#: The processes that try out grammars are started when the first one comes; each has two pipes.
SPARE_FILES = 2 + 2 * NUM_PROCESSES
MAX_NUM_SEQS, MAX_QUEUE = 8, 16
FLAGS = ("--dtype", "float32", "--max-num-seqs", str(MAX_NUM_SEQS), "--max-queue", str(MAX_QUEUE))


def body(**more: Any) -> dict[str, Any]:
    fields = {"model": FIXTURE, "prompt": "The quick brown fox", "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    return {**fields, "stream": True, **more}


def metrics(server: RankServer) -> dict[str, float]:
    """Samples without labels, and those of one label as name{value}."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(httpx.get(server.url + "/metrics").text):
        for sample in family.samples:
            labels = [v for k, v in sample.labels.items() if k not in ("model_name", "engine")]
            found[sample.name + (f"{{{labels[0]}}}" if len(labels) == 1 else "")] = sample.value
    return found


def is_quiet(server: RankServer) -> bool:
    now = metrics(server)
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "kv_blocks{used}")
    return all(now[f"qengine:{name}"] == 0 for name in names)


def num_open_files(server: RankServer) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


def canary(server: RankServer) -> str:
    return str(server.complete(max_tokens=24).json()["choices"][0]["text"])


def answered(results: list[Result]) -> list[Result]:
    return [result for result in results if result.status == 200 and result.is_whole]


def first_tokens(results: list[Result], begin: float, end: float) -> list[float]:
    return [r.first for r in answered(results) if r.first is not None and begin <= r.due < end]


def test_twice_as_much_as_it_can_answer() -> None:
    """Poisson arrivals at 0.3, 2 and 0.3 times what it can answer: it answers as much as ever, and refuses the rest."""
    calm, heavy, after = 15.0, 60.0, 30.0
    draw = random.Random(1)
    with rank_server(*FLAGS, num_ranks=0) as server:
        reference = canary(server)
        best = asyncio.run(capacity(server.url, body(), 15.0, MAX_NUM_SEQS))
        due = list(poisson(0.3 * best, calm, draw))
        due += [calm + moment for moment in poisson(2.0 * best, heavy, draw)]
        due += [calm + heavy + moment for moment in poisson(0.3 * best, after, draw)]
        results = asyncio.run(run_load(server.url, due, lambda index: Shot(body(prompt=f"{index} foxes"))))
        wait_until(lambda: is_quiet(server), 10.0)
        assert canary(server) == reference

    crowded = [result for result in results if calm <= result.due < calm + heavy]
    refused = [result for result in results if result.status == 429]
    goodput = len(answered(crowded)) / heavy
    base = percentile(first_tokens(results, 0, calm), 0.5)
    recovered = percentile(first_tokens(results, calm + heavy + 10, calm + heavy + after), 0.5)
    print(
        shown(
            requests=len(results),
            capacity_per_s=best,
            goodput_per_s=goodput,
            goodput_share=goodput / best,
            refused=len(refused),
            refusal_p99_s=percentile([result.took for result in refused], 0.99),
            first_token_p50_before_s=base,
            first_token_p50_after_s=recovered,
        )
    )
    assert {result.status for result in results} == {200, 429}
    assert len(refused) + len(answered(results)) == len(results)
    assert all(int((result.headers or {})["retry-after"]) >= 1 for result in refused)
    assert goodput > 0.5 * best
    assert percentile([result.took for result in refused], 0.99) < 5.0
    assert recovered < 5 * base + 0.5


# Soak


def soak_shot(index: int) -> Shot:
    """Mixed lengths; one in twenty leaves after its first token, one in twenty is wrong."""
    draw = random.Random(index)
    if draw.random() < 0.05:
        wrong = [{"temperature": 9}, {"prompt": []}, {"max_tokens": 10**6}, {"model": "other"}, {"stop": [""]}]
        return Shot(body(**draw.choice(wrong)))
    prompt = [draw.randrange(100, 2000) for _ in range(draw.choice([1, 5, 30, 100, 300]))]
    more: dict[str, Any] = {
        "prompt": prompt,
        "max_tokens": draw.choice([1, 4, 16, 64]),
        "seed": index,
        "temperature": 1,
    }
    if draw.random() < 0.1:
        # Few enough for the cache of grammars to be full soon.
        more["structured_outputs"] = {"choice": ["yes", "no", f"maybe {index % 50}"]}
        more["ignore_eos"] = False
    return Shot(body(**more), leaves=draw.random() < 0.05)


async def sampled(load: Awaitable[list[Result]], sample: Callable[[], None]) -> list[Result]:
    """The load's results; `sample` is called every now and then meanwhile."""
    running = asyncio.ensure_future(load)
    while not running.done():
        await asyncio.to_thread(sample)
        await asyncio.wait([running], timeout=SAMPLE_SECONDS)
    return running.result()


def test_a_soak() -> None:
    """At 70 % of what it can answer: memory, files and blocks stay, first tokens come as early as at the beginning."""
    seconds, warm_up = 60 * SOAK_MINUTES, 60 * WARM_UP_MINUTES
    samples: list[tuple[float, dict[str, float]]] = []
    with rank_server(*FLAGS, num_ranks=0) as server:
        reference = canary(server)
        best = asyncio.run(capacity(server.url, body(prompt=[200] * 90, max_tokens=22), 15.0, MAX_NUM_SEQS))
        num_files = num_open_files(server)
        due = list(poisson(0.7 * best, seconds, random.Random(2)))
        begin = time.monotonic()
        load = run_load(server.url, due, soak_shot)
        results = asyncio.run(sampled(load, lambda: samples.append((time.monotonic() - begin, metrics(server)))))
        wait_until(lambda: is_quiet(server), 10.0)
        wait_until(lambda: num_open_files(server) <= num_files + SPARE_FILES, 10.0)
        assert canary(server) == reference

    settled = [(moment, found) for moment, found in samples if moment > warm_up]
    times = [moment / 60 for moment, _ in settled]
    growth = slope(times, [found["process_resident_memory_bytes"] / 2**20 for _, found in settled])
    thirds = [percentile(first_tokens(results, part * seconds / 3, (part + 1) * seconds / 3), 0.99) for part in (0, 2)]
    statuses = {status: sum(r.status == status for r in results) for status in sorted({r.status for r in results})}
    print(
        shown(
            minutes=SOAK_MINUTES,
            capacity_per_s=best,
            statuses=statuses,
            rss_mib=settled[-1][1]["process_resident_memory_bytes"] / 2**20,
            rss_mib_per_minute=growth,
            files_before=num_files,
            files_at_most=max(found["process_open_fds"] for _, found in samples),
            first_token_p99_first_third_s=thirds[0],
            first_token_p99_last_third_s=thirds[1],
        )
    )
    assert set(statuses) <= {200, 400, 404, 429}
    assert growth < 1.0
    assert thirds[1] < 5 * thirds[0] + 0.5
