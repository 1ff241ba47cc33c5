"""What clients see of a model in several processes, above all when one of them dies, hangs, or is left alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from qengine.config import EngineConfig
from qengine.engine import Engine
from qengine.models.decoder import Decoder
from qengine.serving.server import EXIT_ENGINE_DEAD, EXIT_INTERRUPTED
from qengine.startup import start_parts
from tests.serving.rank_server import (
    FIXTURE,
    HEADERS,
    KEY,
    LOOPBACK,
    ROOT,
    RankServer,
    children,
    is_alive,
    listening_addresses,
    own_ranks,
    rank_server,
    spoil,
)
from tests.serving.test_server import health, post, run_with, stream_of
from tests.waiting import WAIT_SECONDS, wait_until

NUM_STREAMS = 8
STEP_TIMEOUT = 3.0


@dataclass
class Streams:
    """Answers that come in threads of their own.

    Attributes:
        num_begun: how many have had text.
        last: the last event of each that has ended, and when.
    """

    url: str
    num_begun: int = 0
    last: list[tuple[str, float]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def follow(self, index: int) -> None:
        body = {"model": FIXTURE, "prompt": f"def f{index}", "max_tokens": 480, "stream": True, "ignore_eos": True}
        event = ""
        with httpx.stream("POST", self.url + "/v1/completions", json=body, headers=HEADERS, timeout=60.0) as response:
            for line in response.iter_lines():
                if line.startswith("data: "):
                    with self._lock:
                        self.num_begun += not event
                    event = line.removeprefix("data: ")
        with self._lock:
            self.last.append((event, time.monotonic()))


def with_streams(server: RankServer, fault: Callable[[], None]) -> tuple[Streams, float]:
    """Let `fault` happen in the middle of many answers; returns them, ended, and when it happened."""
    streams = Streams(server.url)
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        told = [pool.submit(streams.follow, index) for index in range(NUM_STREAMS)]
        wait_until(lambda: streams.num_begun == NUM_STREAMS or any(one.done() for one in told))
        fault()
        when = time.monotonic()
        for one in told:
            one.result()
    return streams, when


def value_of(scraped: str, name: str) -> float:
    """The one sample of that name."""
    [line] = [line for line in scraped.splitlines() if line.startswith(name + "{")]
    return float(line.rpartition(" ")[2])


def num_running(server: RankServer) -> float:
    return value_of(httpx.get(server.url + "/metrics", headers=HEADERS).text, "qengine:num_requests_running")


def assert_dead(server: RankServer, streams: Streams, when: float, seconds: float) -> None:
    """Every answer has ended with the error, in time; new ones are refused; then the server ends with its code."""
    assert len(streams.last) == NUM_STREAMS
    for event, ended in streams.last:
        assert json.loads(event)["error"]["code"] == "engine_dead"
        assert ended - when < seconds
    assert server.health() == 503
    assert (refused := server.complete()).status_code == 503
    assert refused.json()["error"]["code"] == "dead"
    assert server.assert_gone(WAIT_SECONDS) == EXIT_ENGINE_DEAD


def test_a_rank_that_is_killed_ends_every_stream_and_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before that: ranks listen on this machine alone, do not know the key, and have half of the threads each."""
    monkeypatch.setenv("QENGINE_API_KEY", KEY)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with rank_server("-tp", "2") as server:
        for _ in range(2):  # What ranks say of a request's last step may come with the next one.
            assert server.complete().status_code == 200
        scraped = httpx.get(server.url + "/metrics", headers=HEADERS).text
        assert value_of(scraped, "qengine:allreduce_seconds_count") >= 8
        assert value_of(scraped, "qengine:allreduce_seconds_sum") > 0.0
        for rank in server.ranks:
            assert listening_addresses(rank) <= {LOOPBACK}
            variables = Path(f"/proc/{rank}/environ").read_bytes().split(b"\0")
            assert b"OMP_NUM_THREADS=1" in variables
            assert not any(variable.startswith(b"QENGINE_API_KEY") for variable in variables)
        streams, when = with_streams(server, lambda: os.kill(server.ranks[1], signal.SIGKILL))
        assert_dead(server, streams, when, 5.0)
    assert any("was killed by SIGKILL" in line for line in server.errors)


def test_a_rank_that_is_stopped_does_the_same_when_time_is_over() -> None:
    with rank_server("-tp", "2", "--step-timeout", f"{STEP_TIMEOUT:g}") as server:
        streams, when = with_streams(server, lambda: os.kill(server.ranks[0], signal.SIGSTOP))
        assert_dead(server, streams, when, STEP_TIMEOUT + 5.0)
    assert any("--step-timeout" in line for line in server.errors)


def test_ranks_do_not_outlive_the_server_not_even_a_stopped_one() -> None:
    with rank_server("-tp", "2") as server:

        def orphan() -> None:
            os.kill(server.ranks[1], signal.SIGSTOP)
            server.process.kill()

        with pytest.raises(httpx.HTTPError):
            with_streams(server, orphan)
        wait_until(lambda: not any(is_alive(pid) for pid in server.ranks))


_START = """
import sys
from qengine.config import EngineConfig
from qengine.startup import start_parts
options = {"model": sys.argv[1], "device": "cpu", "tensor_parallel_size": 2, "max_model_len": 64, "p2p": "on"}
start_parts(EngineConfig.from_options(options), rank_command=(sys.executable, *sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("command", "until"),
    [(("-m", "qengine.runtime.rank"), "started"), (("-m", "tests.runtime.stalled_rank", "1"), "stalled")],
)
def test_an_engine_that_is_killed_before_its_ranks_have_met_leaves_nothing(
    command: tuple[str, ...], until: str, tmp_path: Path
) -> None:
    """As soon as they exist, or while one waits for the other."""
    words = [sys.executable, "-c", _START, FIXTURE, *command]
    variables = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(words, cwd=ROOT, env=variables, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            wait_until(lambda: len(children(process.pid)) == 2)
            ranks = children(process.pid)
            if until == "stalled":
                assert any("rank 1: stalled" in line for line in process.stderr)
        finally:
            process.kill()
    wait_until(lambda: not any(is_alive(pid) for pid in ranks))
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_in_a_terminal_lets_answers_finish_and_leaves_nobody() -> None:
    with rank_server("-tp", "2") as server:
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(server.complete, max_tokens=200, ignore_eos=True)
            wait_until(lambda: answer.done() or num_running(server) >= 1)
            os.killpg(server.process.pid, signal.SIGINT)  # A terminal sends it to the whole group.
            assert answer.result().json()["usage"]["completion_tokens"] == 200
        assert server.assert_gone(WAIT_SECONDS) == EXIT_INTERRUPTED


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_an_exception_in_a_ranks_forward(
    bad_rank: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    command = (sys.executable, "-m", "tests.runtime.failing_rank", str(bad_rank), "raise together")
    options = {"model": FIXTURE, "device": "cpu", "tensor_parallel_size": 2, "max_model_len": 256}

    def start(_: Any) -> Engine:
        return Engine(start_parts(EngineConfig.from_options(options), rank_command=command))

    assert run_with(_story_of_a_death, start, monkeypatch, served_model_names=("scripted",)) == EXIT_ENGINE_DEAD
    assert f"rank {bad_rank}: RuntimeError: evil forward" in caplog.text
    assert own_ranks() == []


def test_an_exception_in_the_forward_of_a_single_process(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, calls = Decoder.forward, []

    def forward(self: Decoder, *inputs: Any) -> Any:
        if len(inputs[0]) == 2:  # Both requests have begun.
            calls.append(inputs)
        if len(calls) >= 5:
            raise RuntimeError("evil forward")
        return real(self, *inputs)

    monkeypatch.setattr(Decoder, "forward", forward)
    config = EngineConfig.from_options({"model": FIXTURE, "device": "cpu", "max_model_len": 256})

    def start(_: Any) -> Engine:
        return Engine.start(config)

    assert run_with(_story_of_a_death, start, monkeypatch, served_model_names=("scripted",)) == EXIT_ENGINE_DEAD
    assert "evil forward" in caplog.text


def _story_of_a_death(url: str) -> None:
    """One answer that streams and one that does not meet the same exception."""
    wait_until(lambda: health(url) == 200)
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(post, url, max_tokens=200, ignore_eos=True)
        with stream_of(url, max_tokens=200, ignore_eos=True) as streamed:
            last = streamed.read().split(b"data: ")[-1]
        assert json.loads(last)["error"]["code"] == "engine_dead"
        assert (whole.result().status_code, whole.result().json()["error"]["code"]) == (500, "engine_dead")
    assert health(url) == 503
    assert post(url).json()["error"]["code"] == "dead"


# Starts that fail


def serve(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qengine", "serve", *words, "--device", "cpu", "--port", "0"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60.0)


def test_an_impossible_number_of_ranks_is_refused_before_any_is_started() -> None:
    refused = serve(FIXTURE, "-tp", "1000")
    assert refused.returncode == 2
    assert "1000 processes, expected at most 64" in refused.stderr


def test_what_a_rank_finds_wrong_with_the_weights_reaches_the_user(tmp_path: Path) -> None:
    """Headers are sound, so that the server's own look at the file finds nothing."""
    for file in os.listdir(FIXTURE):
        shutil.copy(Path(FIXTURE) / file, tmp_path)
    spoil(tmp_path / "model.safetensors", "model.layers.0.mlp.down_proj.scales")
    refused = serve(str(tmp_path), "-tp", "2")
    assert refused.returncode == 2
    assert "scales has 1 values that are NaN or infinite; the file is damaged" in refused.stderr
    assert "Traceback" not in refused.stderr
