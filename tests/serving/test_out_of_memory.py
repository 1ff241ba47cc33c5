"""Steps that run out of memory: tried again smaller, and if that does not help one request fails and no other."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from qengine.models.decoder import Decoder
from qengine.runtime.runner import ModelRunner
from qengine.scheduling.batch import Batch
from qengine.scheduling.pressure import ATTEMPTS
from qengine.serving.service import Phase
from tests.serving.quiet import assert_quiet, scrape
from tests.serving.running import Running
from tests.serving.tiny import TEXT, body, small_server
from tests.waiting import wait_until

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] data. DefaultCPUAllocator: can't allocate memory"),
]
REQUESTS = [body(prompt=f"Tell me about {word}", max_tokens=24) for word in "abcdefgh"]
#: The whole of it is in each step that it is part of.
LARGEST = body(prompt="The largest of them. " * 3, max_tokens=24)


def fail_when(monkeypatch: pytest.MonkeyPatch, error: BaseException, should_fail: Callable[[int], bool]) -> None:
    """Have the model raise `error` in the middle of steps, told by how many sequences they have."""
    forward, begin = Decoder.forward, ModelRunner.begin
    num_sequences = 0

    def remember(self: ModelRunner, batch: Batch) -> Any:
        nonlocal num_sequences
        num_sequences = len(batch.entries)
        return begin(self, batch)

    def fail(self: Decoder, *inputs: Any) -> Any:
        if should_fail(num_sequences):
            # What the step has stored by now, it stores again.
            forward(self, *inputs)
            raise error
        return forward(self, *inputs)

    monkeypatch.setattr(ModelRunner, "begin", remember)
    monkeypatch.setattr(Decoder, "forward", fail)


def gather(monkeypatch: pytest.MonkeyPatch, server: Running, num_sequences: int) -> None:
    """Have the engine wait until so many sequences are there."""
    engine, step = server.engine, server.engine.step
    are_there = False

    def step_together() -> Any:
        nonlocal are_there
        are_there = are_there or engine.num_running + engine.num_waiting == num_sequences
        if are_there:
            return step()
        time.sleep(0.001)
        return []

    monkeypatch.setattr(engine, "step", step_together)


def text(answer: Any) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def oom_steps(server: Running) -> float:
    return scrape(server)["qengine:oom_steps_total"]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_once_costs_nobody_anything(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_server() as server, assert_quiet(server), ThreadPoolExecutor(8) as pool:
        alone = [text(server.post(TEXT, request)) for request in REQUESTS]
        sizes: list[int] = []

        def first_of_eight(num_sequences: int) -> bool:
            sizes.append(num_sequences)
            return num_sequences == 8 and sizes.count(8) == 1

        fail_when(monkeypatch, error, first_of_eight)
        gather(monkeypatch, server, 8)
        assert [text(answer) for answer in pool.map(lambda r: server.post(TEXT, r), REQUESTS)] == alone
        assert sizes[sizes.index(8) + 1] <= 4
        samples = scrape(server)
        assert samples["qengine:oom_steps_total"] == 1
        assert samples["qengine:num_preemptions_total"] >= 1
        assert samples['qengine:request_success_total{finished_reason="error"}'] == 0
        server.engine.check_integrity()


def test_three_times_in_a_row_the_largest_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with small_server() as server, assert_quiet(server), ThreadPoolExecutor(8) as pool:
        requests = [LARGEST, *REQUESTS[1:]]
        alone = [text(server.post(TEXT, request)) for request in requests]
        num_failures = 0

        def thrice_with_all(num_sequences: int) -> bool:
            nonlocal num_failures
            is_next = num_failures < ATTEMPTS and (num_failures > 0 or num_sequences == 8)
            num_failures += is_next
            return is_next

        engine = server.engine
        fail_when(monkeypatch, ERRORS[0], thrice_with_all)
        gather(monkeypatch, server, 8)
        first = pool.submit(server.post, TEXT, requests[0])
        wait_until(lambda: engine.num_waiting == 1)
        answers = [first, *(pool.submit(server.post, TEXT, request) for request in requests[1:])]
        failed, *others = (answer.result() for answer in answers)
        assert (failed.status_code, failed.json()["error"]["code"]) == (500, "out_of_memory")
        assert [text(answer) for answer in others] == alone[1:]
        samples = scrape(server)
        assert samples["qengine:oom_steps_total"] == ATTEMPTS
        assert samples['qengine:request_success_total{finished_reason="error"}'] == 1
        assert samples["qengine:corrupted_requests_total"] == 0
        assert server.get("/health").status_code == 200


def test_a_request_that_cannot_be_computed_fails_and_the_next_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with small_server() as server, assert_quiet(server):
        num_left = ATTEMPTS

        def always_for_now(num_sequences: int) -> bool:
            nonlocal num_left
            num_left -= 1
            return num_left >= 0

        with monkeypatch.context() as patch:
            fail_when(patch, ERRORS[1], always_for_now)
            failed = server.post(TEXT, body(stream=True))
            assert (failed.status_code, failed.json()["error"]["code"]) == (500, "out_of_memory")
        assert server.post(TEXT, body()).status_code == 200


def test_an_engine_that_cannot_compute_one_token_of_anyone_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    with small_server() as server:
        fail_when(monkeypatch, ERRORS[2], lambda num_sequences: True)
        codes = []
        while server.service.phase is Phase.READY:
            response = server.post(TEXT, body())
            codes.append((response.status_code, response.json()["error"]["code"]))
            assert len(codes) < 20
        assert set(codes[:-1]) == {(500, "out_of_memory")}
        assert codes[-1] == (500, "engine_dead")
        assert server.get("/health").status_code == 503


def test_errors_that_are_not_about_memory_are_as_fatal_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    with small_server() as server:
        fail_when(monkeypatch, RuntimeError("an illegal memory access"), lambda num_sequences: True)
        assert server.post(TEXT, body()).json()["error"]["code"] == "engine_dead"
        assert oom_steps(server) == 0
