"""Everything of `bad_inputs`, one after the other and side by side: each gets its answer, and nobody notices.

No answer is a 5xx, each refusal has the shape of every error, nothing is connected to, and the server is as before.
"""

from __future__ import annotations

import http.client
import json
import random
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest

from tests.serving.bad_inputs import AUTH_CASES, CASES
from tests.serving.bad_rows import (
    CHAT,
    CLOSED,
    KEY,
    MAX_MODEL_LEN,
    MESSAGES,
    MODEL,
    OTHER_KEY,
    ROUTES,
    TEMPLATE,
    TEXT,
    Case,
)
from tests.serving.chat_templates import HERMES
from tests.serving.quiet import assert_quiet
from tests.serving.raw import connect
from tests.serving.running import Running
from tests.serving.tiny import small_server

#: How often each is sent among the others, after it was sent once in its turn.
NUM_SHUFFLED = 2
NUM_CONNECTIONS = 8
SEED = 7


@dataclass
class Answer:
    status: int
    content: bytes = b""

    @property
    def error(self) -> Any:
        return json.loads(self.content)["error"]


class Connection:
    """One connection after the other: a new one whenever the server has closed the last."""

    def __init__(self, server: Running) -> None:
        self._server = server
        self._socket: socket.socket | None = None

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def ask(self, case: Case) -> Answer:
        if self._socket is None:
            self._socket = connect(self._server)
        with suppress(ConnectionError):  # It answers, and closes, before it has read all of something too large.
            self._socket.sendall(case.request())
        response = http.client.HTTPResponse(self._socket, method=case.method)
        try:
            response.begin()
            answer = Answer(response.status, response.read())
        except (http.client.HTTPException, ConnectionError):
            answer = Answer(CLOSED)
        if answer.status == CLOSED or response.will_close or case.raw is not None:
            self._close()
        return answer

    def _close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def problem(case: Case, answer: Answer) -> str | None:
    """What is wrong with an answer."""
    if answer.status not in case.statuses:
        return f"{case.name}: {answer.status} {answer.content[:200]!r}, expected {case.statuses}"
    if answer.status < 400 or case.method == "HEAD" or answer.status == CLOSED:
        return None
    error = answer.error
    is_anthropic = case.path.startswith(MESSAGES)
    fields = {"message", "type"} if is_anthropic else {"message", "type", "param", "code"}
    if set(error) != fields or not error["message"]:
        return f"{case.name}: {error} has not the shape of an error"
    # Anthropic's errors name a field in their message alone.
    names_it = case.param is None or (case.param in error["message"] if is_anthropic else error["param"] == case.param)
    if not names_it:
        return f"{case.name}: {error} names another field than {case.param}"
    if case.says not in error["message"] or len(error["message"]) > 1000:
        return f"{case.name}: {error['message'][:300]!r} does not say {case.says!r} in few words"
    return None


def problems(server: Running, cases: Sequence[Case]) -> list[str]:
    with Connection(server) as connection:
        found = [problem(case, connection.ask(case)) for case in cases]
    return [text for text in found if text is not None]


def shuffled_problems(server: Running, cases: Sequence[Case]) -> list[str]:
    every = [case for case in cases for _ in range(NUM_SHUFFLED)]
    mixed = random.Random(SEED).sample(every, len(every))
    with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
        shares = [mixed[index::NUM_CONNECTIONS] for index in range(NUM_CONNECTIONS)]
        return [text for found in pool.map(lambda share: problems(server, share), shares) for text in found]


@pytest.fixture(scope="module")
def nothing_goes_out() -> Iterator[list[Any]]:
    """Addresses beyond this machine that anything in this process connects to or looks up."""
    seen: list[Any] = []
    patch = pytest.MonkeyPatch()
    real_connect, real_lookup = socket.socket.connect, socket.getaddrinfo

    def connect_to(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "localhost"):
            seen.append(address)
        real_connect(self, address)

    def look_up(host: Any, *more: Any, **options: Any) -> Any:
        if host not in (None, "127.0.0.1", "localhost"):
            seen.append(host)
        return real_lookup(host, *more, **options)

    patch.setattr(socket.socket, "connect", connect_to)
    patch.setattr(socket, "getaddrinfo", look_up)
    yield seen
    patch.undo()


@pytest.fixture(scope="module")
def server(nothing_goes_out: list[Any]) -> Iterator[Running]:
    with small_server(max_model_len=MAX_MODEL_LEN) as running:
        running.engine.tokenizer = running.engine.tokenizer.with_chat_template(TEMPLATE + HERMES)
        yield running


def test_good_requests_are_good(server: Running) -> None:
    for path, body in ROUTES.items():
        assert server.post(path, body).status_code == 200


def test_names_are_unique() -> None:
    for cases in (CASES, AUTH_CASES):
        names = [case.name for case in cases]
        assert sorted(set(names)) == sorted(names)


def test_each_gets_its_answer(server: Running, nothing_goes_out: list[Any]) -> None:
    with assert_quiet(server):
        assert problems(server, CASES) == []
    assert nothing_goes_out == []


def test_all_of_them_side_by_side(server: Running, nothing_goes_out: list[Any]) -> None:
    with assert_quiet(server):
        assert shuffled_problems(server, CASES) == []
    assert nothing_goes_out == []
    server.engine.check_integrity()


def test_keys() -> None:
    options = {"api_keys": (KEY, OTHER_KEY), "metrics_no_auth": False}
    with small_server(server_options=options) as server:
        assert problems(server, AUTH_CASES) == []
        assert shuffled_problems(server, AUTH_CASES) == []
        good = server.post(TEXT, ROUTES[TEXT], headers={"x-api-key": KEY})
        assert good.status_code == 200


def test_many_connections_and_many_requests_on_one(server: Running) -> None:
    with assert_quiet(server):
        idle = [connect(server) for _ in range(200)]
        with server.client() as client:
            body = {"model": MODEL, "prompt": "hi", "max_tokens": 1}
            assert {client.post(TEXT, json=body).status_code for _ in range(200)} == {200}
        for connection in idle:
            connection.close()


def test_a_stop_string_that_comes_in_pieces_leaks_nothing(server: Running) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Tell me"}], "temperature": 0, "ignore_eos": True}
    text = server.post(CHAT, {**body, "max_tokens": 60}).json()["choices"][0]["message"]["content"]
    for start in range(5, 40, 7):
        stop = text[start : start + 9]
        expected = text[: text.index(stop)]
        response = server.post(CHAT, {**body, "max_tokens": 60, "stop": [stop], "stream": True})
        payloads = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
        assert "".join(p["choices"][0]["delta"].get("content") or "" for p in payloads) == expected
