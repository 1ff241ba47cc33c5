"""The server over real sockets, with the scripted engine: shapes of answers, errors, faults, and clients that leave."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from qengine.serving.service import Phase
from tests.serving.raw import open_request, reset
from tests.serving.running import Running, serving
from tests.serving.scripted_engine import DIE_PROMPT, NAN_PROMPT, NEVER_FITS_PROMPT, SCRIPT, ScriptedEngine
from tests.waiting import WAIT_SECONDS, wait_until

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    """One server for the tests that leave nothing behind; each test checks that it did not."""
    with serving(ScriptedEngine()) as running:
        yield running


@pytest.fixture
def server(shared: Running) -> Iterator[Running]:
    yield shared
    shared.wait_until_quiet()


def chat_body(**more: Any) -> dict[str, Any]:
    return {"model": "scripted", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, **more}


def text_body(**more: Any) -> dict[str, Any]:
    return {"model": "scripted", "prompt": "hi", **more}


def events(response: httpx.Response) -> list[Any]:
    """The payloads of an event stream; every line must be one."""
    assert response.headers["content-type"].startswith("text/event-stream")
    payloads = []
    for block in response.text.split("\n\n")[:-1]:
        assert block.startswith("data: ")
        payload = block.removeprefix("data: ")
        payloads.append(payload if payload == "[DONE]" else json.loads(payload))
    return payloads


def assert_error(response: httpx.Response, status: int, *, param: str | None = None, code: str | None = None) -> str:
    """The response is OpenAI's error object; its message."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    if param is not None:
        assert error["param"] == param
    if code is not None:
        assert error["code"] == code
    assert error["message"]
    return str(error["message"])


# Shapes


def test_health_version_and_models(server: Running) -> None:
    assert server.get("/health").json() == {"status": "ready"}
    assert server.get("/version").json() == {"version": "0.1.0"}
    models = server.get("/v1/models").json()
    assert models["object"] == "list"
    assert [m["id"] for m in models["data"]] == ["scripted"]
    assert server.get("/v1/models/scripted").json() == models["data"][0]
    assert_error(server.get("/v1/models/other"), 404, code="model_not_found")


def test_served_names_may_be_paths_and_the_first_is_echoed() -> None:
    with serving(ScriptedEngine(), served_model_names=("org/first", "second")) as server:
        assert server.get("/v1/models/org/first").json()["id"] == "org/first"
        assert server.get("/v1/models/org%2Ffirst").json()["id"] == "org/first"
        answer = server.post(CHAT, chat_body(model="second")).json()
        assert answer["model"] == "org/first"
        assert_error(server.post(CHAT, chat_body(model="scripted")), 404, code="model_not_found")


def test_chat_answer(server: Running) -> None:
    answer = server.post(CHAT, chat_body(max_tokens=len(server.engine.script))).json()
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    [choice] = answer["choices"]
    assert choice["message"]["content"] == SCRIPT
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == "length"
    counts = answer["usage"]
    assert counts["completion_tokens"] == len(server.engine.script)
    assert counts["total_tokens"] == counts["prompt_tokens"] + counts["completion_tokens"]


@pytest.mark.parametrize("wants_usage", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_chat_stream_has_openais_order_and_the_same_text(server: Running, n: int, wants_usage: bool) -> None:
    body = chat_body(n=n, max_tokens=100, stop=["yellow"])
    whole = server.post(CHAT, body).json()
    options = {"stream_options": {"include_usage": True}} if wants_usage else {}
    payloads = events(server.post(CHAT, {**body, "stream": True, **options}))
    assert payloads.pop() == "[DONE]"
    if wants_usage:
        last = payloads.pop()
        assert last["choices"] == []
        assert last["usage"] == whole["usage"]
        assert all(p["usage"] is None for p in payloads)
    else:
        assert all("usage" not in p for p in payloads)
    assert len({(p["id"], p["created"], p["model"], p["object"]) for p in payloads}) == 1
    for index in range(n):
        mine = [p["choices"][0] for p in payloads if p["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert mine[-1]["delta"] == {}
        assert mine[-1]["finish_reason"] == whole["choices"][index]["finish_reason"] == "stop"
        between = mine[1:-1]
        assert all(c["finish_reason"] is None and set(c["delta"]) == {"content"} for c in between)
        text = "".join(c["delta"]["content"] for c in between)
        assert text == whole["choices"][index]["message"]["content"] == SCRIPT.split("yellow")[0]


def test_streamed_logprobs_equal_the_whole(server: Running) -> None:
    body = chat_body(max_tokens=30, logprobs=True, top_logprobs=1)
    whole = server.post(CHAT, body).json()["choices"][0]["logprobs"]["content"]
    payloads = events(server.post(CHAT, {**body, "stream": True}))[:-1]
    pieces = [p["choices"][0]["logprobs"] for p in payloads]
    assert [entry for piece in pieces if piece for entry in piece["content"]] == whole
    assert len(whole) == 30
    joined = b"".join(bytes(entry["bytes"]) for entry in whole).decode()
    assert joined == server.post(CHAT, chat_body(max_tokens=30)).json()["choices"][0]["message"]["content"]


def test_completions_are_numbered_prompt_by_prompt(server: Running) -> None:
    body = text_body(prompt=["a", "b b b", [5, 6]], n=2, max_tokens=4, echo=True)
    answer = server.post(TEXT, body).json()
    assert [c["index"] for c in answer["choices"]] == list(range(6))
    script = server.engine.tokenizer.decode(server.engine.script[:4])
    starts = ["a", "a", "b b b", "b b b", *[server.engine.tokenizer.decode([5, 6])] * 2]
    assert [c["text"] for c in answer["choices"]] == [start + script for start in starts]
    payloads = events(server.post(TEXT, {**body, "stream": True}))[:-1]
    for index in range(6):
        mine = [p["choices"][0] for p in payloads if p["choices"][0]["index"] == index]
        assert "".join(c["text"] for c in mine) == answer["choices"][index]["text"]
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == ["length"]


def test_completions_default_to_16_tokens(server: Running) -> None:
    assert server.post(TEXT, text_body()).json()["usage"]["completion_tokens"] == 16


def test_completions_text_offsets_point_into_the_text(server: Running) -> None:
    choice = server.post(TEXT, text_body(max_tokens=30, logprobs=1)).json()["choices"][0]
    offsets, tokens = choice["logprobs"]["text_offset"], choice["logprobs"]["tokens"]
    for offset, token in zip(offsets, tokens, strict=True):
        if "\ufffd" not in token:
            assert choice["text"][offset:].startswith(token)
    assert offsets == sorted(offsets)


# Refusals


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"", {}, 400),
        (b"{", {}, 400),
        (b"null", {}, 400),
        (b"[]", {}, 400),
        (b'"x"', {}, 400),
        (b'{"model": NaN}', {}, 400),
        (b'{"model": "\xff"}', {}, 400),
        (b'{"model": "\\ud800"}', {}, 400),
        (b"{}", {"content-type": "text/plain"}, 415),
        (b"{}", {"content-type": "application/x-www-form-urlencoded"}, 415),
        (b"{}", {"content-type": ""}, 415),
        (b"{}", {"content-encoding": "gzip"}, 415),
    ],
)
def test_bodies_that_are_no_json_object(server: Running, content: bytes, headers: dict[str, str], status: int) -> None:
    with server.client() as client:
        sent = {"content-type": "application/json", **headers}
        assert_error(client.post(CHAT, content=content, headers=sent), status)


def test_content_type_may_name_its_charset(server: Running) -> None:
    headers = {"content-type": "application/json; charset=utf-8"}
    with server.client() as client:
        assert client.post(CHAT, content=json.dumps(chat_body()), headers=headers).status_code == 200


@pytest.mark.parametrize("is_chunked", [False, True])
def test_body_of_more_than_8_mib(server: Running, is_chunked: bool) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    size = 8 * 2**20 + 1
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_SECONDS) as connection:
        if is_chunked:
            connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
            connection.sendall(f"{size:x}\r\n".encode() + b" " * size)
        else:
            connection.sendall(f"{head}Content-Length: {size}\r\n\r\n".encode())
        assert b"413" in connection.recv(65536).split(b"\r\n")[0]


def test_unknown_routes_and_methods(server: Running) -> None:
    assert_error(server.get("/v2/nothing"), 404, code="route_not_found")
    response = server.get(CHAT)
    assert_error(response, 405, code="method_not_allowed")
    assert response.headers["allow"] == "POST"
    assert_error(server.get("/redoc"), 404)
    assert_error(server.get("/v1/models/../../etc/passwd"), 404)


def test_head_of_a_megabyte_is_refused(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_SECONDS) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: ")
        try:
            connection.sendall(b"a" * 2**20)
            answer = connection.recv(4096)
        except ConnectionError:
            answer = b""
    assert answer == b"" or b" 400 " in answer.split(b"\r\n")[0]


def test_a_thousand_headers_are_refused(server: Running) -> None:
    headers = {f"x-{index}": "1" for index in range(1000)}
    assert_error(server.get("/health", headers=headers), 431)


@pytest.mark.parametrize(
    ("more", "status", "param"),
    [
        ({"model": "../../etc/passwd"}, 404, "model"),
        ({"model": "x" * 2000}, 400, "model"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
        ({"messages": [{"role": "user", "content": "x " * 3000}]}, 400, "messages"),
        ({"max_tokens": 250}, 400, "messages"),
        ({"min_tokens": 9}, 400, "min_tokens"),
        ({"chat_template_kwargs": {"tokenize": True}}, 400, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"max_chars": 1}}, 400, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": []}}, 400, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"tools": [{}]}}, 400, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"continue_final_message": True}}, 400, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"unheard_of": 1}}, 400, "chat_template_kwargs"),
        ({"chat_template": "{% for i in range(9) %}x{% endfor %}"}, 400, "chat_template"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
            400,
            None,
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_chat_refusals_have_their_own_status_even_when_streaming(
    server: Running, stream: bool, more: dict[str, Any], status: int, param: str | None
) -> None:
    assert_error(server.post(CHAT, chat_body(stream=stream, **more)), status, param=param)


def test_a_long_text_is_refused_before_it_is_tokenized(server: Running) -> None:
    num_before = len(server.engine.prepared)
    message = assert_error(server.post(TEXT, text_body(prompt="x" * 5000)), 400, code="string_above_max_length")
    assert "5000" in message
    assert_error(server.post(CHAT, chat_body(messages=[{"role": "user", "content": "x" * 5000}])), 400)
    assert len(server.engine.prepared) == num_before


@pytest.mark.parametrize("stream", [False, True])
def test_one_prompt_of_several_that_never_fits_refuses_all(server: Running, stream: bool) -> None:
    body = text_body(prompt=["fine", NEVER_FITS_PROMPT, "fine"], stream=stream)
    assert_error(server.post(TEXT, body), 400, param="prompt", code="context_length_exceeded")
    assert not server.engine.has_unfinished


# Faults


def test_a_failed_request_is_a_500_and_harms_no_other(server: Running) -> None:
    with ThreadPoolExecutor(2) as pool:
        good = pool.submit(server.post, CHAT, chat_body(max_tokens=40))
        bad = pool.submit(server.post, TEXT, text_body(prompt=NAN_PROMPT))
        assert "NaN" in assert_error(bad.result(), 500, code="generation_failed")
        assert good.result().status_code == 200
    assert server.get("/health").status_code == 200


def test_a_dead_engine_fails_everyone_and_health_says_so() -> None:
    engine = ScriptedEngine()
    with serving(engine) as server, server.client() as client, ThreadPoolExecutor(1) as pool:
        engine.hold(listens=True)
        engine.allow(1)
        with client.stream("POST", CHAT, json=chat_body(stream=True, max_tokens=200)) as stream:
            killer = pool.submit(server.post, TEXT, text_body(prompt=DIE_PROMPT))
            wait_until(lambda: len(engine.requests) == 2)
            engine.allow(1)
            wait_until(lambda: server.service.phase is Phase.DEAD)
            text = stream.read().decode()
        assert_error(killer.result(), 500, code="engine_dead")
        assert "[DONE]" not in text
        assert json.loads(text.split("data: ")[-1])["error"]["code"] == "engine_dead"
        for response in (server.post(CHAT, chat_body()), server.get("/v1/models"), server.get("/health")):
            assert_error(response, 503, code="dead")


def test_loading_draining_and_stopped_are_503_with_retry_after() -> None:
    with serving(None) as server:
        for response in (server.get("/health"), server.post(CHAT, chat_body()), server.get("/v1/models")):
            assert_error(response, 503, code="loading")
            assert int(response.headers["retry-after"]) >= 1
        assert server.get("/health").json()["status"] == "loading"
        server.service.stop()
        assert_error(server.get("/health"), 503, code="stopped")


def test_draining_refuses_the_new_and_finishes_the_old() -> None:
    engine = ScriptedEngine()
    with serving(engine) as server, ThreadPoolExecutor(1) as pool:
        engine.hold()
        old = pool.submit(server.post, CHAT, chat_body())
        wait_until(lambda: engine.has_unfinished)
        server.service.begin_drain()
        assert_error(server.post(CHAT, chat_body()), 503, code="draining")
        assert_error(server.get("/health"), 503, code="draining")
        engine.allow()
        assert old.result().json()["choices"][0]["finish_reason"] == "length"
        server.wait_until_quiet()


def test_more_than_the_server_holds_is_429_with_retry_after() -> None:
    engine = ScriptedEngine(max_num_seqs=1)
    with serving(engine, max_queue=2) as server, ThreadPoolExecutor(3) as pool:
        engine.hold()
        held = [pool.submit(server.post, CHAT, chat_body()) for _ in range(3)]
        wait_until(lambda: server.async_engine is not None and server.async_engine.admission.num_in_flight == 3)
        response = server.post(CHAT, chat_body())
        assert_error(response, 429, code="queue_full")
        assert int(response.headers["retry-after"]) >= 1
        assert_error(server.post(CHAT, chat_body(n=4)), 400, param="n")
        engine.allow()
        assert [future.result().status_code for future in held] == [200, 200, 200]
        server.wait_until_quiet()
        assert server.post(CHAT, chat_body(n=3)).status_code == 200


# Clients that leave


@pytest.mark.parametrize("leave", [socket.socket.close, reset], ids=["fin", "rst"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_aborts_what_runs_and_what_waits(stream: bool, leave: Any) -> None:
    engine = ScriptedEngine(max_num_seqs=2)
    with serving(engine) as server:
        engine.hold(listens=True)
        connections = [open_request(server, text_body(n=2, max_tokens=200, stream=stream)) for _ in range(3)]
        wait_until(lambda: len(engine.requests) == 3)
        engine.hold()
        assert engine.num_waiting == 2
        for connection in connections:
            leave(connection)
        # The engine's thread is held in a step: only the event loop can have noticed.
        wait_until(lambda: server.async_engine is not None and server.async_engine.admission.num_in_flight == 0)
        num_steps = engine.num_steps
        engine.allow()
        server.wait_until_quiet()
        assert engine.num_steps <= num_steps + 2
        assert len(engine.aborted) == 3
        assert engine.num_free_blocks == engine.info.num_blocks
        assert server.post(TEXT, text_body()).status_code == 200


def test_a_client_that_leaves_mid_stream_aborts() -> None:
    engine = ScriptedEngine()
    with serving(engine) as server:
        engine.hold()
        connection = open_request(server, chat_body(stream=True, max_tokens=200), CHAT)
        engine.allow(3)
        received = b""
        while b'"content":"The' not in received:
            received += connection.recv(4096)
        connection.close()
        wait_until(lambda: server.async_engine is not None and server.async_engine.admission.num_in_flight == 0)
        engine.allow()
        server.wait_until_quiet()
        assert len(engine.aborted) == 1
        assert engine.num_steps <= 5


def test_a_reader_that_is_late_gets_everything(server: Running) -> None:
    whole = server.post(CHAT, chat_body(max_tokens=200)).json()["choices"][0]["message"]["content"]
    with server.client() as client, client.stream("POST", CHAT, json=chat_body(stream=True, max_tokens=200)) as stream:
        wait_until(lambda: not server.engine.has_unfinished)
        lines = [line for line in stream.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    texts = [json.loads(line[6:])["choices"][0]["delta"].get("content", "") for line in lines[:-1]]
    assert "".join(texts) == whole
