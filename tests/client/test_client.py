"""Addresses as people type them, event streams however they are cut, and calls to a real server."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qengine.client.address import parse_address
from qengine.client.api import ApiClient, ServerError
from qengine.client.events import EventParser, StreamError, finish_reason_of, num_tokens_of, parse_chunk, text_of
from qengine.errors import ConfigError
from tests.serving.running import Running, serving
from tests.serving.scripted_engine import SCRIPT, ScriptedEngine
from tests.waiting import wait_until

BODY = {"model": "scripted", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}


@pytest.mark.parametrize(
    ("url", "base", "models"),
    [
        ("localhost:8000", "http://localhost:8000", "/v1/models"),
        ("http://gpu-box:8000/v1", "http://gpu-box:8000", "/v1/models"),
        ("http://gpu-box:8000/v1/", "http://gpu-box:8000", "/v1/models"),
        (" https://example.org/proxy/ ", "https://example.org:443/proxy", "/proxy/v1/models"),
        ("http://[::1]:80", "http://[::1]:80", "/v1/models"),
    ],
)
def test_an_address_is_read_as_it_is_meant(url: str, base: str, models: str) -> None:
    address = parse_address(url)
    assert (str(address), address.path("/v1/models")) == (base, models)


@pytest.mark.parametrize(
    "url",
    ["", "ftp://x", "http://", "http://x:99999", "http://me:pw@x", "http://x/?q=1", "http://x/#a", "http://x y", "ü:1"],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="expected an address such as http"):
        parse_address(url)


@given(st.data())
def test_events_do_not_depend_on_how_bytes_are_cut(data: st.DataObject) -> None:
    stream = ': hello\r\n\r\ndata: {"a": "ü"}\n\nevent: x\ndata: two\ndata:lines\n\n\ndata: [DONE]\n\n'.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    parser = EventParser()
    events = [e for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True) for e in parser.feed(stream[a:b])]
    assert events == ['{"a": "ü"}', "two\nlines", "[DONE]"]


@pytest.mark.parametrize("data", ["", "[1]", "{", '{"error": {"message": "it broke"}}', '{"error": "it broke"}'])
def test_what_is_no_chunk_is_an_error(data: str) -> None:
    with pytest.raises(StreamError, match="it broke" if "broke" in data else "expected a JSON object"):
        parse_chunk(data)


def test_a_line_without_an_end_is_not_kept_for_ever() -> None:
    parser = EventParser()
    for _ in range(16):
        assert parser.feed(b"x" * 2**20) == []
    with pytest.raises(StreamError, match="without an end of line"):
        parser.feed(b"x")


@pytest.mark.parametrize("choices", [None, [], [None], [{}], [{"delta": None}], [{"delta": {}}], 3])
def test_a_chunk_may_hold_nothing(choices: object) -> None:
    chunk = {"choices": choices, "usage": None}
    assert (text_of(chunk), finish_reason_of(chunk), num_tokens_of(chunk)) == ("", None, None)


@pytest.fixture
def server() -> Iterator[Running]:
    with serving(ScriptedEngine(), api_keys=("open-sesame",), served_model_names=("a", "b")) as running:
        yield running


def test_an_answer_comes_in_chunks(server: Running) -> None:
    client = ApiClient(parse_address(server.url), "open-sesame")
    assert client.model_names() == ["a", "b"]
    chunks = list(client.stream_chat({**BODY, "model": "a"}))
    text = "".join(text_of(chunk) for chunk in chunks)
    assert text
    assert SCRIPT.startswith(text)
    assert [num_tokens_of(c) for c in chunks if num_tokens_of(c) is not None] == [9]
    assert [finish_reason_of(c) for c in chunks if finish_reason_of(c)] == ["length"]


def test_a_closed_iterator_ends_the_request(server: Running) -> None:
    chunks = ApiClient(parse_address(server.url), "open-sesame").stream_chat({**BODY, "model": "a", "max_tokens": 200})
    server.engine.hold(listens=True)
    server.engine.allow(3)
    next(chunks)
    chunks.close()
    wait_until(lambda: len(server.engine.aborted) == 1)


def test_a_refusal_says_what_to_do(server: Running) -> None:
    with pytest.raises(ServerError, match=r"API key is missing or wrong.*\(give the key with QENGINE_API_KEY"):
        ApiClient(parse_address(server.url)).model_names()
    client = ApiClient(parse_address(server.url), "open-sesame")
    with pytest.raises(ServerError, match="temperature") as caught:
        next(client.stream_chat({**BODY, "model": "a", "temperature": 9}))
    assert caught.value.status == 400


def test_nobody_there_is_said_plainly() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(
        ServerError, match=rf"cannot talk to http://127.0.0.1:{port}: .*; is the server running there\?"
    ):
        ApiClient(parse_address(f"127.0.0.1:{port}")).model_names()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n<html>", "lists no models at /v1/models"),
        (b"hello\r\n\r\n", "cannot talk to"),
        (b"HTTP/1.1 502 Bad Gateway\r\n\r\n<html>", "status 502 Bad Gateway"),
        (b'HTTP/1.1 429 Busy\r\nRetry-After: 7\r\n\r\n{"error": {"message": "full"}}', r"full \(.*in 7 s\)"),
    ],
)
def test_what_is_no_api_is_an_error(answer: bytes, message: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(ServerError, match=message):
            ApiClient(parse_address(f"127.0.0.1:{listener.getsockname()[1]}")).model_names()
        thread.join()
