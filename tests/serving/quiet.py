"""What must hold after every fault: nothing of any request is left, and the server answers as before."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client.parser import text_string_to_metric_families

from tests.serving.running import Running
from tests.waiting import wait_until

_SPARE_FDS = 2
_SPARE_TASKS = 2


def scrape(server: Running) -> dict[str, float]:
    """All samples of /metrics, as 'name{label="value",...}' with the labels sorted, without model_name and engine."""
    samples: dict[str, float] = {}
    for family in text_string_to_metric_families(server.get("/metrics").text):
        for sample in family.samples:
            shown = [f'{k}="{v}"' for k, v in sorted(sample.labels.items()) if k not in ("model_name", "engine")]
            samples[sample.name + ("{" + ",".join(shown) + "}" if shown else "")] = sample.value
    return samples


def num_open_files() -> int:
    gc.collect()  # Sockets that a test has dropped but Python has not.
    return len(os.listdir("/proc/self/fd"))


def num_tasks(server: Running) -> int:
    """Tasks in the server's event loop."""
    loop = server.async_engine._loop if server.async_engine is not None else None
    return 0 if loop is None else len(asyncio.all_tasks(loop))


def canary(server: Running) -> str:
    """An answer that must always be the same."""
    body = {"model": server.service.model_names[0], "prompt": "The sky is", "temperature": 0, "max_tokens": 12}
    response = server.post("/v1/completions", body)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


@contextmanager
def assert_quiet(server: Running) -> Iterator[None]:
    """Whatever happens inside, afterwards the gauges are zero, all blocks, tasks and files are free again, and the
    canary answers as before."""
    reference = canary(server)
    num_files, tasks, num_blocks = num_open_files(), num_tasks(server), server.engine.num_free_blocks
    yield
    wait_until(lambda: _is_idle(server))
    wait_until(lambda: server.engine.num_free_blocks == num_blocks)
    wait_until(lambda: num_tasks(server) <= tasks + _SPARE_TASKS)
    wait_until(lambda: num_open_files() <= num_files + _SPARE_FDS)
    assert server.async_engine is not None
    assert server.async_engine.admission.num_in_flight == 0
    assert canary(server) == reference


def _is_idle(server: Running) -> bool:
    samples = scrape(server)
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", 'kv_blocks{state="used"}')
    return all(samples[server.service.metrics_prefix + name] == 0 for name in names)
