"""Clients and requests that go wrong, beside others that must not notice: each test ends with `assert_quiet`."""

from __future__ import annotations

import dataclasses
import http.client
import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from qengine.request import Request
from qengine.serving import body as body_module
from qengine.serving import http_server
from qengine.serving.limits import Limits
from qengine.serving.open_files import NUM_OTHER_FILES, make_room
from tests.serving.quiet import assert_quiet, num_open_files, scrape
from tests.serving.raw import connect, is_closed, open_request, read_all, read_events, request_bytes, reset
from tests.serving.running import Running, serving, watched_loop
from tests.serving.scripted_engine import ScriptedEngine
from tests.serving.tiny import TEXT, body, small_server
from tests.waiting import WAIT_SECONDS, wait_until

ROOT = Path(__file__).parents[2]
#: A stream that is far larger than all buffers between server and client.
LONG = {"model": "scripted", "prompt": "hi", "stream": True, "n": 8, "max_tokens": 1500, "ignore_eos": True}


def set_limits(monkeypatch: pytest.MonkeyPatch, **limits: Any) -> None:
    for module in (http_server, body_module):
        monkeypatch.setattr(module, "LIMITS", Limits(**limits))


# Clients that leave


def test_seventy_of_a_hundred_streams_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifty close after some tokens, ten reset, ten give up in the queue; thirty stay and get all they asked for."""
    slowness = 0.02
    with small_server(max_num_seqs=8, max_model_len=512) as server, assert_quiet(server):
        step = server.engine.step

        def slow_step() -> Any:
            time.sleep(slowness)
            return step()

        def leave(connection: socket.socket, num_events: int, how: Callable[[socket.socket], None]) -> None:
            assert read_events(connection, num_events).count(b"data: ") >= num_events
            how(connection)

        monkeypatch.setattr(server.engine, "step", slow_step)
        opened = [
            open_request(server, body(stream=True, prompt=f"Number {i}", max_tokens=400), TEXT) for i in range(70)
        ]
        staying = [
            open_request(server, body(stream=True, prompt=f"Number {i}", max_tokens=20), TEXT, "Connection: close")
            for i in range(30)
        ]
        engine = server.engine
        wait_until(lambda: engine.num_running + engine.num_waiting == 100)
        impatient, leaving = opened[60:], opened[:60]
        for connection in impatient:
            connection.close()
        wait_until(lambda: engine.num_running + engine.num_waiting <= 90)
        slowness = 0.0
        with ThreadPoolExecutor(100) as pool:
            left = [
                pool.submit(leave, connection, 1 + index % 5, reset if index >= 50 else socket.socket.close)
                for index, connection in enumerate(leaving)
            ]
            stayed = [pool.submit(read_all, connection) for connection in staying]
            for future in left:
                future.result()
            for future in stayed:
                assert future.result().endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        for connection in staying:
            connection.close()
        name = "qengine:request_success_total"
        wait_until(lambda: scrape(server)[f'{name}{{finished_reason="abort"}}'] == 70)
        assert scrape(server)[f'{name}{{finished_reason="length"}}'] == 31  # With the canary.


# A request that fails inside


def test_one_of_eight_fails_and_seven_are_what_they_are_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def text(answer: Any) -> str:
        assert answer.status_code == 200
        return str(answer.json()["choices"][0]["text"])

    requests = [body(prompt=f"Tell me about {word}", max_tokens=24) for word in "abcdefgh"]
    with small_server() as server, assert_quiet(server), ThreadPoolExecutor(8) as pool:
        alone = [text(server.post(TEXT, request)) for request in requests]
        victim = server.engine.tokenizer.encode(requests[3]["prompt"], add_special_tokens=True)
        update = server.engine.scheduler.update

        def update_and_fail(batch: Any, result: Any) -> list[Request]:
            failed = {
                entry.request_id: "it is broken"
                for entry in batch.entries
                if entry.sample is not None
                and list(entry.sample.prompt_token_ids) == victim
                and len(entry.sample.output_token_ids) == 5
            }
            sampled = {name: token for name, token in result.sampled.items() if name not in failed}
            changed: list[Request] = update(batch, dataclasses.replace(result, sampled=sampled, failed=failed))
            return changed

        monkeypatch.setattr(server.engine.scheduler, "update", update_and_fail)
        answers = list(pool.map(lambda request: server.post(TEXT, request), requests))
        assert answers[3].status_code == 500
        assert answers[3].json()["error"]["code"] == "generation_failed"
        others = [index for index in range(8) if index != 3]
        assert [text(answers[index]) for index in others] == [alone[index] for index in others]
        samples = scrape(server)
        assert samples['qengine:request_success_total{finished_reason="error"}'] == 1
        assert samples["qengine:corrupted_requests_total"] == 1
        server.engine.check_integrity()


# Clients that do not read


def normal_text(server: Running) -> str:
    response = server.post(TEXT, {"model": "scripted", "prompt": "hi", "max_tokens": 50})
    return str(response.json()["choices"][0]["text"])


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_those_who_do_not_read_are_dropped_and_the_others_do_not_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two read nothing, and two a byte now and then, which is as good as nothing. What they miss is kept nowhere."""
    set_limits(monkeypatch, stalled_stream_seconds=0.5, send_buffer_bytes=8192)
    with serving(ScriptedEngine(max_num_seqs=64, max_model_len=2000)) as server, assert_quiet(server):
        reference = normal_text(server)
        before = resident_bytes()
        slow = [open_request(server, LONG, receive_buffer=2048) for _ in range(4)]

        def have_been_dropped() -> bool:
            for connection in slow[:2]:
                with suppress(ConnectionError):
                    connection.recv(1)
            return scrape(server)["qengine:stream_stalls_total"] == 4

        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(lambda _: normal_text(server), range(8))) == {reference}
        wait_until(have_been_dropped)
        assert resident_bytes() - before < 20 * 2**20
        for connection in slow:
            connection.close()


def test_a_reader_that_is_slow_but_reads_is_not_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked at twice while one large answer is on its way, and has read on each time."""
    set_limits(monkeypatch, stalled_stream_seconds=1.0, stalled_stream_bytes=1, send_buffer_bytes=8192)
    num_looks, look = 0, http_server.GuardedProtocol._check_reader

    def counted(self: http_server.GuardedProtocol) -> None:
        nonlocal num_looks
        num_looks += 1
        look(self)

    monkeypatch.setattr(http_server.GuardedProtocol, "_check_reader", counted)
    whole = {**LONG, "stream": False, "max_tokens": 700, "logprobs": 1}  # 160 kB
    with serving(ScriptedEngine(max_model_len=2000)) as server, assert_quiet(server):
        with open_request(server, whole, receive_buffer=2048) as connection:
            received = b""
            while not received.endswith(b"}}"):
                more = connection.recv(256 if num_looks < 2 else 65536)
                assert more, "the server closed"
                received += more
                time.sleep(0.01 if num_looks < 2 else 0.0)
        answer = json.loads(received.partition(b"\r\n\r\n")[2])
        assert answer["usage"]["completion_tokens"] == 8 * 700
        assert num_looks >= 2
        assert scrape(server)["qengine:stream_stalls_total"] == 0


def test_a_client_that_is_stopped_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its machine still answers for it, so that no keep-alive notices: only that nothing is read."""
    set_limits(monkeypatch, stalled_stream_seconds=0.5, send_buffer_bytes=8192)
    code = (
        "import os, signal, socket, sys; s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048);"
        "s.connect(('127.0.0.1', int(sys.argv[1]))); s.sendall(sys.stdin.buffer.read()); s.recv(10);"
        "os.kill(os.getpid(), signal.SIGSTOP)"
    )
    engine = ScriptedEngine(max_model_len=2000)
    with serving(engine) as server, assert_quiet(server):
        client = subprocess.Popen([sys.executable, "-c", code, str(server.port)], stdin=subprocess.PIPE)
        with client:
            try:
                assert client.stdin is not None
                client.stdin.write(request_bytes(TEXT, LONG))
                client.stdin.close()
                wait_until(lambda: scrape(server)["qengine:stream_stalls_total"] == 1)
                server.wait_until_quiet()
            finally:
                client.kill()


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="not Linux")
def test_the_system_sends_at_once_and_notices_a_peer_that_vanishes() -> None:
    """That the kernel then does so is its own affair: the options are set on every connection."""
    left, right = socket.socketpair()
    with left, right, socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()

        class Transport:
            def get_extra_info(self, name: str) -> socket.socket:
                return accepted

        with client, accepted:
            http_server._set_up_socket(Transport())  # type: ignore[arg-type]
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 30


# Requests that want much


#: Rendered, it would take a minute.
NESTED_RANGES = "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "chat_template": NESTED_RANGES}),
        (TEXT, {"prompt": "hi", "n": 10**9}),
        (TEXT, {"prompt": "hi", "logprobs": 10**9}),
        (TEXT, {"prompt": "hi", "max_tokens": 10**9, "n": 8, "logprobs": 20}),
    ],
    ids=["templates", "choices", "log-probabilities", "tokens"],
)
def test_what_asks_for_much_is_refused_for_little(path: str, fields: dict[str, Any]) -> None:
    """At once, that is."""
    with serving(ScriptedEngine(), max_logprobs=20) as server, assert_quiet(server):
        asked = {"model": "scripted", **fields}
        assert server.post(path, asked).status_code == 400
        before = resident_bytes()
        with watched_loop(server, time.process_time) as lags:
            for _ in range(20):
                assert server.post(path, asked).status_code == 400
        assert max(lags) < 0.5
        assert resident_bytes() - before < 5 * 2**20


def test_heads_that_are_too_large_are_not_kept() -> None:
    head = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"a" * 2**20 + b"\r\n\r\n"

    def send_it() -> None:
        with connect(server) as connection, suppress(ConnectionError):
            connection.sendall(head)
            read_all(connection)

    with serving(ScriptedEngine()) as server, assert_quiet(server):
        send_it()
        before = resident_bytes()
        for _ in range(20):
            send_it()
        assert resident_bytes() - before < 5 * 2**20


# Clients that do not send


def test_heads_and_bodies_that_trickle_in_are_cut_off_and_health_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    set_limits(monkeypatch, head_seconds=3.0, body_seconds=3.0)
    with serving(ScriptedEngine()) as server, assert_quiet(server):
        head = request_bytes(TEXT, {"model": "scripted", "prompt": "x" * 10_000})
        elsewhere = b"GET /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
        slow = [(connect(server), head[: 20 + index % 40]) for index in range(200)]
        slow += [(connect(server), b"") for _ in range(10)]  # These never say anything.
        slow += [(connect(server), head[:-9_000]) for _ in range(50)]
        slow += [(connect(server), elsewhere) for _ in range(10)]  # No route reads this body.
        for connection, start in slow:
            connection.sendall(start)
        num_open = len(slow)
        deadline = time.monotonic() + WAIT_SECONDS
        waiting = [connection for connection, _ in slow]
        while waiting:
            assert time.monotonic() < deadline, f"{len(waiting)} of {num_open} connections are still open"
            assert server.get("/health").status_code == 200
            waiting = [connection for connection in waiting if not trickle(connection)]
        for connection, _ in slow:
            connection.close()
        samples = scrape(server)
        assert samples['qengine:slow_clients_total{part="head"}'] == 210
        assert samples['qengine:slow_clients_total{part="body"}'] <= 60


def trickle(connection: socket.socket) -> bool:
    """Send one byte more; whether the server has closed. Nothing is sent by those that never spoke."""
    if is_closed(connection):
        return True
    try:
        connection.send(b"x")
    except (ConnectionError, BlockingIOError):
        return False
    return False


def test_a_late_body_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    set_limits(monkeypatch, body_seconds=0.3)
    with serving(ScriptedEngine()) as server, connect(server) as connection:
        connection.sendall(request_bytes(TEXT, {"model": "scripted"})[:-4])
        answer = read_all(connection)
        assert answer.startswith(b"HTTP/1.1 408")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "timeout_error"


def test_bodies_under_way_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that came first go on, small ones too; what is too much is told so, and the bytes of who left are free."""
    small, large = ({"model": "scripted", "prompt": "x" * size, "max_tokens": 1} for size in (10, 100_000))
    with serving(ScriptedEngine()) as server, assert_quiet(server):
        bodies = server.service.bodies
        monkeypatch.setattr(bodies, "capacity", 190_000)
        halves = [(request_bytes("/tokenize", large), connect(server)) for _ in range(2)]
        for content, connection in halves:
            connection.sendall(content[:90_000])
        wait_until(lambda: bodies.num_in_flight > 170_000)
        with open_request(server, large, "/tokenize") as refused:
            answer = read_all(refused)
        assert answer.startswith(b"HTTP/1.1 429")
        assert b"retry-after: 1" in answer.lower()
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "bodies_full"
        assert server.post(TEXT, small).status_code == 200
        assert scrape(server)['qengine:rejections_total{reason="bodies_full"}'] == 1
        (content, first), (_, second) = halves
        second.close()
        wait_until(lambda: bodies.num_in_flight < 100_000)
        first.sendall(content[90_000:])
        response = http.client.HTTPResponse(first)
        response.begin()
        assert (response.status, len(response.read()) > 0) == (200, True)
        wait_until(lambda: bodies.num_in_flight == 0)
        first.close()


def test_a_connection_in_use_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadlines are for what is being sent: neither for an answer that takes long, nor for the pause after it."""
    set_limits(monkeypatch, head_seconds=1.0, body_seconds=1.0)
    engine = ScriptedEngine()
    with serving(engine) as server, connect(server) as connection:
        for _ in range(2):
            engine.hold()
            connection.sendall(request_bytes(TEXT, {"model": "scripted", "prompt": "hi", "max_tokens": 1}))
            wait_until(lambda: engine.has_unfinished)
            time.sleep(1.5)
            engine.allow()
            response = http.client.HTTPResponse(connection)
            response.begin()
            assert (response.status, len(response.read()) > 0) == (200, True)
            time.sleep(0.5)


def test_more_connections_than_the_server_holds_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    set_limits(monkeypatch, num_connections=3)
    with serving(ScriptedEngine()) as server:
        num_files = num_open_files()
        held = [connect(server) for _ in range(3)]
        wait_until(lambda: num_open_files() >= num_files + 6)
        for content in (b"", request_bytes(TEXT, {"model": "scripted", "prompt": "x" * 100_000})):
            with connect(server) as extra:
                extra.sendall(content)
                answer = read_all(extra)
            assert answer.startswith(b"HTTP/1.1 503")
            assert b"retry-after: 1" in answer.lower()
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "connections_full"
        for connection in held:
            assert not is_closed(connection)
            connection.close()
        wait_until(lambda: num_open_files() <= num_files)
        assert server.get("/health").status_code == 200
        assert scrape(server)['qengine:rejections_total{reason="connections_full"}'] == 2


@pytest.mark.parametrize(
    ("soft", "hard", "fits", "raised"),
    [
        (100_000, 100_000, 8192, None),
        (1024, 100_000, 8192, 8192 + NUM_OTHER_FILES),
        (1024, resource.RLIM_INFINITY, 8192, 8192 + NUM_OTHER_FILES),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 8192, None),
        (1024, 4096, 4096 - NUM_OTHER_FILES, 4096),
        (256, 256, 128, 256),
    ],
)
def test_the_limit_on_open_files_is_raised_as_far_as_needed_and_allowed(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    soft: int,
    hard: int,
    fits: int,
    raised: int | None,
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    with caplog.at_level("WARNING", logger="qengine"):
        assert make_room(8192) == fits
    assert asked == ([] if raised is None else [(raised, hard)])
    assert ("ulimit -n" in caplog.text) == (fits < 8192)


@pytest.mark.parametrize("content", [b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n\r\n"])
def test_what_is_no_http_gets_an_error_like_every_other(content: bytes) -> None:
    with serving(ScriptedEngine()) as server, assert_quiet(server), connect(server) as connection:
        connection.sendall(content + b"\r\n\r\n")
        answer = read_all(connection)
        assert answer.startswith(b"HTTP/1.1 400")
        assert set(json.loads(answer.partition(b"\r\n\r\n")[2])["error"]) == {"message", "type", "param", "code"}
