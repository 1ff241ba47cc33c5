"""Timeouts, limits per key, other sites, and health that follows progress."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from qengine.errors import ConfigError
from qengine.serving import async_engine
from qengine.serving.app import ROUTERS, make_app
from qengine.serving.auth import OPEN_PATHS
from qengine.serving.limits import Limits
from qengine.serving.options import ServerOptions
from qengine.serving.service import Service
from tests.serving.chat_templates import HERMES
from tests.serving.quiet import assert_quiet, scrape
from tests.serving.running import Running, serving
from tests.serving.scripted_engine import SCRIPT, ScriptedEngine
from tests.serving.tiny import PROMPT, TEXT, body, small_server
from tests.waiting import WAIT_SECONDS, wait_until

HI = {"model": "scripted", "prompt": "hi", "max_tokens": 40}
#: More steps than the tests allow before they have seen what they wait for.
LONG = {**HI, "max_tokens": 240}


def error_of(response: httpx.Response) -> Any:
    return response.json()["error"]


# Timeouts


@pytest.mark.parametrize("stream", [False, True])
def test_who_waits_too_long_gets_503_and_who_runs_goes_on(stream: bool) -> None:
    engine = ScriptedEngine(max_num_seqs=1)
    with serving(engine, queue_timeout=0.3) as server, assert_quiet(server), ThreadPoolExecutor(1) as pool:
        engine.hold(listens=True)
        running = pool.submit(server.post, TEXT, LONG)
        wait_until(lambda: engine.num_running == 1)
        response = server.post(TEXT, {**HI, "stream": stream})
        assert response.status_code == 503
        assert error_of(response)["code"] == "queue_timeout"
        assert int(response.headers["retry-after"]) >= 1
        assert scrape(server)['qengine:rejections_total{reason="queue_timeout"}'] == 1
        engine.allow()
        assert running.result().status_code == 200


def test_who_runs_in_time_is_not_hit_by_the_queues_timeout() -> None:
    engine = ScriptedEngine()
    with serving(engine, queue_timeout=0.1) as server, ThreadPoolExecutor(1) as pool:
        engine.hold()
        running = pool.submit(server.post, TEXT, HI)
        wait_until(lambda: engine.num_running == 1)
        time.sleep(0.3)
        engine.allow()
        assert running.result().status_code == 200


def test_what_takes_too_long_is_cut_short() -> None:
    engine = ScriptedEngine()
    with serving(engine, request_timeout=3.0) as server, assert_quiet(server), ThreadPoolExecutor(2) as pool:
        engine.hold(listens=True)
        whole = pool.submit(server.post, TEXT, LONG)
        streamed = pool.submit(server.post, TEXT, {**LONG, "stream": True})
        wait_until(lambda: len(engine.requests) == 2)
        engine.allow(2)
        answer = whole.result().json()["choices"][0]
        assert answer["finish_reason"] == "abort"
        assert answer["text"]
        assert SCRIPT.startswith(answer["text"][: len(SCRIPT)])
        text = streamed.result().text
        assert "[DONE]" not in text
        assert json.loads(text.split("data: ")[-1])["error"]["code"] == "request_timeout"
        engine.allow()


def test_what_never_began_in_time_is_a_504() -> None:
    engine = ScriptedEngine()
    with serving(engine, request_timeout=1.0) as server, assert_quiet(server):
        engine.hold()
        for stream in (False, True):
            response = server.post(TEXT, {**HI, "stream": stream})
            assert response.status_code == 504
            assert error_of(response)["code"] == "request_timeout"
        engine.allow()


def test_one_deadline_is_for_thoughts_and_their_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    counted_from: list[float] = []
    seconds_left = async_engine.AsyncEngine._seconds_left

    def watched(self: async_engine.AsyncEngine, arrival_time: float) -> float | None:
        counted_from.append(arrival_time)
        return seconds_left(self, arrival_time)

    monkeypatch.setattr(async_engine.AsyncEngine, "_seconds_left", watched)
    engine = ScriptedEngine()
    engine.tokenizer = engine.tokenizer.with_chat_template(HERMES)
    engine.answers["</think>"] = "Three."
    engine.answers["hi"] = "<think>\n" + "and so on " * 20
    with serving(engine, request_timeout=WAIT_SECONDS) as server, assert_quiet(server):
        counted_from.clear()
        thinking = {"type": "enabled", "budget_tokens": 6}
        asked = {"model": "scripted", "max_tokens": 40, "messages": [{"role": "user", "content": "hi"}]}
        answer = server.post("/v1/messages", {**asked, "thinking": thinking})
        assert answer.json()["content"][-1]["text"] == "Three."
        # Before and in the engine, for each of the two.
        assert len(counted_from) == 4
        assert len(set(counted_from)) == 1


# Grammars


@pytest.mark.parametrize("stream", [False, True])
def test_who_waits_too_long_for_a_grammar_is_told_so(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    monkeypatch.setattr(async_engine, "LIMITS", Limits(grammar_wait_seconds=0.2))
    asked = {**HI, "stream": stream, "structured_outputs": {"choice": ["a"]}}
    with serving(ScriptedEngine()) as server, stuck_grammars(server), assert_quiet(server):
        response = server.post(TEXT, asked)
        assert response.status_code == 503
        assert error_of(response)["code"] == "queue_timeout"
        assert int(response.headers["retry-after"]) >= 1
        assert server.post(TEXT, HI).status_code == 200


def test_the_wait_for_a_grammar_counts_as_time_of_the_request() -> None:
    asked = {**HI, "structured_outputs": {"choice": ["a"]}}
    with serving(ScriptedEngine(), request_timeout=0.3) as server, stuck_grammars(server):
        response = server.post(TEXT, asked)
        assert response.status_code == 504
        assert error_of(response)["code"] == "request_timeout"
        server.wait_until_quiet()


@contextmanager
def stuck_grammars(server: Running) -> Iterator[None]:
    """Compiling takes until the end of the block."""
    may_go_on = threading.Event()
    compile_grammar = server.engine.compile_grammar

    def stuck(source: Any) -> Any:
        may_go_on.wait()
        return compile_grammar(source)

    server.engine.compile_grammar = stuck
    try:
        yield
    finally:
        may_go_on.set()


# Keys


def test_each_key_has_its_own_share() -> None:
    engine = ScriptedEngine()
    keys = ("first-key", "second-key")
    with serving(engine, api_keys=keys, max_concurrency_per_key=2, metrics_no_auth=True) as server:
        engine.hold()
        with ThreadPoolExecutor(3) as pool:
            first, second = ({"x-api-key": key} for key in keys)
            held = [pool.submit(server.post, TEXT, HI, headers=first) for _ in range(2)]
            wait_until(lambda: server.async_engine is not None and server.async_engine.admission.num_in_flight == 2)
            response = server.post(TEXT, HI, headers=first)
            assert response.status_code == 429
            assert error_of(response)["code"] == "key_concurrency"
            assert int(response.headers["retry-after"]) >= 1
            assert server.get("/v1/models", headers=first).status_code == 200
            held.append(pool.submit(server.post, TEXT, HI, headers=second))
            engine.allow()
            assert [future.result().status_code for future in held] == [200, 200, 200]
        assert server.post(TEXT, HI, headers=first).status_code == 200
        assert scrape(server)['qengine:rejections_total{reason="key_concurrency"}'] == 1


def test_no_key_sees_what_another_has_sent() -> None:
    long_prompt = " ".join([PROMPT] * 12)
    options = {"api_keys": ("first-key", "second-key"), "metrics_no_auth": True}
    with small_server(server_options=options, max_model_len=512) as server:

        def hits(key: str) -> float:
            before = scrape(server)["qengine:prefix_cache_hits_total"]
            response = server.post(TEXT, body(prompt=long_prompt, max_tokens=1), headers={"x-api-key": key})
            assert response.status_code == 200
            return scrape(server)["qengine:prefix_cache_hits_total"] - before

        assert hits("first-key") == 0
        assert hits("first-key") > 64
        assert hits("second-key") == 0
        assert hits("second-key") > 64


def test_every_route_there_is_wants_a_key() -> None:
    routes = [(route.path, method) for router in ROUTERS for route in router.routes for method in route.methods]  # type: ignore[attr-defined]
    assert len(routes) >= 8
    with serving(ScriptedEngine(), api_keys=("some-key",)) as server, server.client() as client:
        for path, method in routes:
            expected = {200} if path in OPEN_PATHS else {401}
            for spelled in (path, path.upper(), f"/{path}", f"{path}/"):
                # Whole, since a client takes what follows two slashes for a host.
                status = client.request(method, server.url + spelled.replace("{name:path}", "x")).status_code
                assert status in (expected if spelled == path else {401}), (method, spelled)


#: Every route there is. A new one belongs here, and in OPEN_PATHS only if strangers may ask it.
ROUTE_SNAPSHOT = {
    *("GET,HEAD /", "GET,HEAD /health", "GET,HEAD /metrics", "GET /version", "GET /docs", "GET /openapi.json"),
    *("GET /v1/models", "GET /v1/models/{name:path}", "POST /tokenize", "POST /detokenize", "POST /v1/embeddings"),
    *("POST /v1/chat/completions", "POST /v1/completions", "POST /v1/responses", "POST /v1/messages"),
    *("POST /v1/messages/count_tokens",),
}
OPEN_SNAPSHOT = {"/", "/health"}


def test_there_are_no_routes_but_these() -> None:
    layer: Any = make_app(Service(), ServerOptions(api_keys=("some-key",)))
    while not isinstance(layer, FastAPI):
        layer = layer._app
    methods: dict[str, set[str]] = {}
    for entry in layer.routes:
        # Newer versions of the framework keep routers as they were included.
        router = getattr(entry, "original_router", None)
        for route in [entry] if router is None else router.routes:
            methods.setdefault(route.path, set()).update(route.methods)
    files = {path for path in methods if path.startswith("/web/")}
    found = {f"{','.join(sorted(methods[path]))} {path}" for path in methods.keys() - files}
    assert found == ROUTE_SNAPSHOT
    assert OPEN_PATHS - files == OPEN_SNAPSHOT
    assert all(methods[path] == {"GET", "HEAD"} for path in files)


# Other sites


def preflight(server: Running, origin: str, path: str = TEXT) -> httpx.Response:
    with server.client() as client:
        headers = {
            "origin": origin,
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type",
        }
        return client.options(server.url + path, headers=headers)


@pytest.mark.parametrize("keys", [(), ("some-key",)])
def test_pages_of_other_sites_are_let_in_only_if_named(keys: tuple[str, ...]) -> None:
    headers = {"x-api-key": keys[0]} if keys else {}
    with serving(ScriptedEngine(), api_keys=keys, allowed_origins=("https://app.example",)) as server:
        allowed = preflight(server, "https://app.example")
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://app.example"
        assert "authorization" in allowed.headers["access-control-allow-headers"]
        assert preflight(server, "https://evil.example").status_code == 400
        answer = server.post(TEXT, HI, headers={"origin": "https://app.example", **headers})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        refused = server.post(TEXT, HI, headers={"origin": "https://evil.example", **headers})
        assert "access-control-allow-origin" not in refused.headers
        assert refused.status_code == (200 if keys else 403)
        rebound = server.post(TEXT, HI, headers={"host": "app.example", **headers})
        assert rebound.status_code == (200 if keys else 403)


def test_a_preflight_needs_no_key_and_tells_nothing() -> None:
    """Browsers send it without one. Its answer is the same for whatever is there, and for what is not."""
    with serving(ScriptedEngine(), api_keys=("some-key",), allowed_origins=("https://app.example",)) as server:
        for origin, status in (("https://app.example", 200), ("https://evil.example", 400), ("null", 400)):
            answers = {
                (answer.status_code, answer.content, tuple(h for h in answer.headers.items() if h[0] != "date"))
                for answer in (preflight(server, origin, path) for path in (TEXT, "/metrics", "/nothing", "//x"))
            }
            ((found, _, headers),) = answers
            assert found == status
            assert ("access-control-allow-origin" in dict(headers)) == (status == 200)
            assert "access-control-allow-credentials" not in dict(headers)
        with server.client() as client:
            # No preflight: browsers say which method they mean to use.
            for headers in ({}, {"origin": "https://app.example"}):
                assert client.options(TEXT, headers=headers).status_code == 401
            refused = client.get("/v1/models", headers={"origin": "https://app.example"})
            assert refused.status_code == 401
            assert refused.headers["access-control-allow-origin"] == "https://app.example"


def test_without_being_asked_nobody_is_let_in() -> None:
    with serving(ScriptedEngine(), api_keys=("some-key",)) as server:
        response = preflight(server, "https://app.example")
        assert response.status_code == 401
        assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"queue_timeout": 0}, "queue_timeout"),
        ({"request_timeout": float("inf")}, "request_timeout"),
        ({"max_concurrency_per_key": 2}, "--api-key"),
        ({"max_concurrency_per_key": 0, "api_keys": ("some-key",)}, "refuse everyone"),
        ({"allowed_origins": ("https://app.example/path",)}, "without a path"),
        ({"allowed_origins": ("app.example",)}, "--allowed-origins"),
        ({"metrics_prefix": "a-b:"}, "--metrics-prefix"),
        ({"metrics_prefix": ""}, "--metrics-prefix"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ServerOptions(**options)


# Health


def test_an_engine_that_hangs_is_not_healthy_until_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_engine, "LIMITS", Limits(stuck_step_seconds=0.2))
    engine = ScriptedEngine()
    with serving(engine) as server, assert_quiet(server), ThreadPoolExecutor(1) as pool:
        assert server.get("/health").status_code == 200
        engine.hold()
        held = pool.submit(server.post, TEXT, HI)
        wait_until(lambda: server.get("/health").status_code == 503)
        response = server.get("/health")
        assert response.json()["status"] == error_of(response)["code"] == "stuck"
        assert scrape(server)["qengine:engine_healthy"] == 0
        engine.allow()
        assert held.result().status_code == 200
        wait_until(lambda: server.get("/health").status_code == 200)
        assert scrape(server)["qengine:engine_healthy"] == 1
