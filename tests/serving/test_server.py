"""run_server as a process: its address, its signals, its exit codes, and start-up errors."""

from __future__ import annotations

import gc
import json
import os
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from qengine.config import EngineConfig
from qengine.errors import ConfigError, LoadError
from qengine.serving import http_server, large_json, server
from qengine.serving.banner import Takes, try_command
from qengine.serving.limits import LIMITS, Limits
from qengine.serving.options import ServerOptions
from qengine.serving.server import EXIT_ENGINE_DEAD, EXIT_INTERRUPTED
from qengine.serving.signals import StopSignals
from qengine.serving.sockets import base_url, close_listener, open_listener
from tests.serving.running import serving
from tests.serving.scripted_engine import DIE_PROMPT, ScriptedEngine
from tests.waiting import WAIT_SECONDS, wait_until

ROOT = Path(__file__).parent.parent.parent
TEXT = "/v1/completions"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def run_with(
    story: Callable[[str], None], start_engine: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch, **options: Any
) -> int:
    """Run a server in this thread, which hears the process's signals, while `story` happens in another.

    Returns:
        The server's exit code. Whatever `story` raises is raised.
    """
    # The signal at the end of the story ends it.
    monkeypatch.setattr(server, "DEATH_LINGER_SECONDS", WAIT_SECONDS)
    port = free_port()
    has_ended = threading.Event()

    def tell() -> None:
        try:
            wait_until(lambda: is_answering(port))
            story(f"http://127.0.0.1:{port}")
        finally:
            for _ in range(50):  # A story that went wrong must not leave a server behind.
                if has_ended.wait(0.2):
                    break
                send(signal.SIGTERM)

    # Signals that come when the server has ended must not end the tests.
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with ThreadPoolExecutor(1) as pool:
            told = pool.submit(tell)
            try:
                code = server.run_server(EngineConfig(), ServerOptions(port=port, **options), start_engine=start_engine)
            finally:
                has_ended.set()
            told.result()
            return code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_answering(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def post(url: str, **body: Any) -> httpx.Response:
    return httpx.post(url + TEXT, json={"model": "scripted", "prompt": "hi", **body}, timeout=WAIT_SECONDS)


@contextmanager
def stream_of(url: str, **body: Any) -> Iterator[httpx.Response]:
    """An answer that has begun."""
    content = {"model": "scripted", "prompt": "hi", "stream": True, **body}
    with httpx.stream("POST", url + TEXT, json=content, timeout=WAIT_SECONDS) as response:
        yield response


def health(url: str) -> int:
    return httpx.get(url + "/health", timeout=WAIT_SECONDS).status_code


def test_a_process_prints_a_command_that_works_and_ends_with_0() -> None:
    command = [sys.executable, "-m", "tests.serving.serve_scripted", '{"port": 0}']
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            printed = ""
            while "-d '" not in printed:
                line = process.stdout.readline()
                assert line
                printed += line
            url = re.search(r"address +(http://127.0.0.1:[1-9][0-9]*)", printed)
            assert url is not None
            curl = printed[printed.index("curl") :]
            assert shlex.split(curl)[1] == url[1] + "/v1/chat/completions"
            answer = subprocess.run(["bash", "-c", curl], capture_output=True, timeout=WAIT_SECONDS, check=True)
            assert json.loads(answer.stdout)["choices"][0]["finish_reason"] == "length"
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=WAIT_SECONDS)
            assert (process.returncode, errors) == (0, "")
        finally:
            process.kill()


def test_sigterm_finishes_what_is_in_flight_and_refuses_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ScriptedEngine()

    def story(url: str) -> None:
        wait_until(lambda: health(url) == 200)
        engine.hold()
        engine.allow(1)
        with stream_of(url, max_tokens=30) as old:
            send(signal.SIGTERM)
            wait_until(lambda: health(url) == 503)
            refused = post(url)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            engine.allow()
            assert old.read().endswith(b"data: [DONE]\n\n")

    assert run_with(story, lambda config: engine, monkeypatch) == 0
    assert engine.is_shut_down


def test_a_server_that_is_shut_down_is_not_called_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, has_begun, has_looked = ScriptedEngine(), threading.Event(), threading.Event()
    shutdown = engine.shutdown

    def shut_down_slowly() -> None:
        has_begun.set()
        assert has_looked.wait(WAIT_SECONDS)
        shutdown()

    monkeypatch.setattr(engine, "shutdown", shut_down_slowly)

    def story(url: str) -> None:
        wait_until(lambda: health(url) == 200)
        send(signal.SIGTERM)
        assert has_begun.wait(WAIT_SECONDS)
        answers = [httpx.get(url + "/health", timeout=WAIT_SECONDS), post(url)]
        has_looked.set()
        assert [(answer.status_code, answer.json()["error"]["code"]) for answer in answers] == [(503, "stopped")] * 2

    assert run_with(story, lambda config: engine, monkeypatch) == 0
    assert sys.getswitchinterval() > server._SWITCH_SECONDS


def test_what_was_computed_is_answered_after_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers with many log-probabilities are made one after the other, when the engine is done with them."""
    may_be_made = threading.Event()
    monkeypatch.setattr(large_json, "_NUM_INLINE", 0)
    make = large_json.large_json

    def make_late(*arguments: Any, **more: Any) -> Any:
        assert may_be_made.wait(WAIT_SECONDS)
        return make(*arguments, **more)

    monkeypatch.setattr(large_json, "large_json", make_late)
    with serving(ScriptedEngine()) as running, StopSignals() as signals, ThreadPoolExecutor(4) as pool:
        engine = running.async_engine
        assert engine is not None
        content = {"model": "scripted", "prompt": "hi", "max_tokens": 3, "logprobs": 2}
        answers = [pool.submit(running.post, TEXT, content) for _ in range(2)]
        calls = running.service.calls
        wait_until(lambda: calls.num_in_flight == 2 and engine.admission.num_in_flight == 0)
        draining = pool.submit(server._drain, running.service, engine, signals, WAIT_SECONDS)
        time.sleep(0.1)
        assert not draining.done()
        may_be_made.set()
        draining.result()
        engine.shutdown()
        assert [answer.result().status_code for answer in answers] == [200, 200]


def test_eight_streams_are_finished_after_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ScriptedEngine(max_num_seqs=8)

    def story(url: str) -> None:
        wait_until(lambda: health(url) == 200)
        engine.hold(listens=True)
        with ThreadPoolExecutor(8) as pool:
            old = [pool.submit(post, url, stream=True, max_tokens=240) for _ in range(8)]
            wait_until(lambda: len(engine.requests) == 8)
            send(signal.SIGTERM)
            wait_until(lambda: health(url) == 503)
            assert [post(url).status_code for _ in range(3)] == [503] * 3
            engine.allow()
            assert all(future.result().text.endswith("data: [DONE]\n\n") for future in old)

    assert run_with(story, lambda config: engine, monkeypatch) == 0


@pytest.mark.parametrize("is_patient", [True, False])
def test_a_second_signal_or_the_end_of_time_stops_even_a_step_that_hangs(
    monkeypatch: pytest.MonkeyPatch, is_patient: bool
) -> None:
    monkeypatch.setattr(server, "_ABORT_SECONDS", 0.2)
    engine = ScriptedEngine()

    def story(url: str) -> None:
        wait_until(lambda: health(url) == 200)
        engine.hold()
        engine.allow(1)
        with stream_of(url, max_tokens=30) as old:
            send(signal.SIGINT)
            if is_patient:
                wait_until(lambda: health(url) == 503)
                send(signal.SIGINT)
            last = old.read().split(b"data: ")[-1]
            error = json.loads(last)["error"]
            assert (error["message"], error["code"]) == ("the server is shutting down", "draining")

    drain_timeout = 60.0 if is_patient else 0.1
    try:
        assert run_with(story, lambda config: engine, monkeypatch, drain_timeout=drain_timeout) == EXIT_INTERRUPTED
    finally:
        engine.allow()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, EXIT_INTERRUPTED), (signal.SIGTERM, 0)])
def test_a_signal_while_loading_ends_it(monkeypatch: pytest.MonkeyPatch, number: int, code: int) -> None:
    was_interrupted = False
    has_begun = threading.Event()

    def load(config: EngineConfig) -> Any:
        nonlocal was_interrupted
        try:
            has_begun.set()
            threading.Event().wait(WAIT_SECONDS)
        except BaseException:
            was_interrupted = True
            raise

    def story(url: str) -> None:
        response = httpx.get(f"{url}/v1/models", timeout=WAIT_SECONDS)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "loading")
        assert has_begun.wait(WAIT_SECONDS)
        send(number)

    assert run_with(story, load, monkeypatch) == code
    assert was_interrupted


def test_a_dead_engine_ends_the_server(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def story(url: str) -> None:
        wait_until(lambda: health(url) == 200)
        assert post(url, prompt=DIE_PROMPT).status_code == 500
        assert post(url).json()["error"]["code"] == "dead"

    assert run_with(story, lambda config: ScriptedEngine(), monkeypatch) == EXIT_ENGINE_DEAD
    assert "a scripted failure of the device" in caplog.text


def test_an_engine_that_dies_while_it_is_stopped_is_told_by_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ScriptedEngine()

    def story(url: str) -> None:
        wait_until(lambda: health(url) == 200)
        engine.hold()
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(post, url, prompt=DIE_PROMPT)
            wait_until(lambda: engine.has_unfinished)
            send(signal.SIGTERM)
            wait_until(lambda: health(url) == 503)
            engine.allow()
            assert answer.result().status_code == 500

    assert run_with(story, lambda config: engine, monkeypatch) == EXIT_ENGINE_DEAD


def test_the_collector_leaves_what_the_start_made_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A walk through all of it would stop every stream for as long as it takes."""
    in_walks = []

    def story(url: str) -> None:
        wait_until(lambda: health(url) == 200 and gc.get_freeze_count() > 0)
        in_walks.append(len(gc.get_objects()))
        send(signal.SIGTERM)

    gc.unfreeze()
    before = len(gc.get_objects())
    assert run_with(story, lambda config: ScriptedEngine(), monkeypatch) == 0
    assert in_walks[0] < before / 10
    assert gc.get_freeze_count() == 0


def test_a_load_error_is_raised_and_frees_the_port(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: EngineConfig) -> Any:
        raise LoadError("there is no such model")

    options = ServerOptions(port=free_port())
    with pytest.raises(LoadError, match="no such model"):
        server.run_server(EngineConfig(), options, start_engine=fail)
    close_listener(open_listener(options))


def test_a_busy_port_fails_before_the_model_is_read() -> None:
    def never(config: EngineConfig) -> Any:
        raise AssertionError("the model was read")

    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            server.run_server(EngineConfig(), ServerOptions(port=port), start_engine=never)
    assert str(caught.value) == (
        f"cannot listen on 127.0.0.1:{port}: Address already in use; "
        "stop what uses it or choose another --port (0 picks one)"
    )


@pytest.mark.parametrize("host", ["203.0.113.7", "no.such.host.invalid"])
def test_an_address_that_is_not_ours(host: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(host)):
        open_listener(ServerOptions(host=host, port=0, allow_no_auth=True))


def test_a_unix_socket_is_its_owners_and_is_freed(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with serving(ScriptedEngine(), uds=path) as running:
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        os.chmod(path, 0o660)  # As for a proxy; it is the same file.
        with pytest.raises(ConfigError, match="in use"):
            open_listener(ServerOptions(uds=path))
        transport = httpx.HTTPTransport(uds=path)
        with httpx.Client(transport=transport, base_url=running.url) as client:
            assert client.get("/v1/models").status_code == 200
    assert not os.path.exists(path)


def test_a_server_that_stops_leaves_its_successors_unix_socket(tmp_path: Path) -> None:
    options = ServerOptions(uds=str(tmp_path / "socket"))
    first = open_listener(options)
    first.close()
    second = open_listener(options)
    close_listener(first)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "socket"))
    close_listener(second)
    assert not (tmp_path / "socket").exists()


def test_a_stale_unix_socket_is_replaced_and_a_file_is_not(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)
    options = ServerOptions(uds=path)
    close_listener(open_listener(options))
    Path(path).write_text("precious")
    with pytest.raises(ConfigError, match="no socket"):
        open_listener(options)
    assert Path(path).read_text() == "precious"


def test_a_certificate_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "pem").write_text("nonsense")
    pem = str(tmp_path / "pem")
    with (
        pytest.raises(ConfigError, match="--ssl-certfile"),
        serving(ScriptedEngine(), ssl_keyfile=pem, ssl_certfile=pem),
    ):
        pass


def test_urls() -> None:
    for host, start in (("127.0.0.1", "http://127.0.0.1:"), ("0.0.0.0", "http://127.0.0.1:")):
        options = ServerOptions(host=host, port=0, allow_no_auth=True)
        listener = open_listener(options)
        assert base_url(listener, options).startswith(start)
        close_listener(listener)


def test_the_command_survives_any_name_and_shows_no_key() -> None:
    options = ServerOptions(api_keys=("secret-key",), uds="/run/a b")
    command = try_command('it\'s "a" $HOME `x`', "http://localhost", options, takes="messages")
    assert "secret-key" not in command
    words = shlex.split(command.replace("\\\n", " "))
    assert json.loads(words[words.index("-d") + 1])["model"] == 'it\'s "a" $HOME `x`'
    assert words[words.index("--unix-socket") + 1] == "/run/a b"


@pytest.mark.parametrize(("takes", "prompt"), [("text", "The capital of France is"), ("ids", [1, 2, 3])])
def test_the_command_asks_with_what_the_model_takes(takes: Takes, prompt: object) -> None:
    words = shlex.split(try_command("m", "http://localhost", ServerOptions(), takes=takes).replace("\\\n", " "))
    assert json.loads(words[words.index("-d") + 1])["prompt"] == prompt


def test_a_head_that_trickles_in_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "LIMITS", Limits(head_seconds=1.0))
    with serving(ScriptedEngine()) as running, socket.create_connection(("127.0.0.1", running.port)) as connection:
        connection.settimeout(WAIT_SECONDS)
        # A whole request first: the deadline is for each head, and a connection in use is not cut.
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        is_cut = False
        for byte in b"GET /health HTTP/1.1\r\nX: " + b"x" * 200:
            try:
                connection.sendall(bytes([byte]))
                connection.setblocking(False)
                is_cut = connection.recv(10) == b""
            except BlockingIOError:
                pass
            except ConnectionError:
                is_cut = True
            if is_cut:
                break
            connection.settimeout(WAIT_SECONDS)
            time.sleep(0.02)
        assert is_cut
        assert LIMITS.head_seconds == 10
