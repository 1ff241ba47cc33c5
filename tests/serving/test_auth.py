"""Keys, the loopback guard, and options that would expose a server."""

from __future__ import annotations

import asyncio
import http.client
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from qengine.errors import ConfigError
from qengine.serving import auth
from qengine.serving.auth import ApiKeyGate, LoopbackGate
from qengine.serving.exposure import check_exposure, is_loopback
from qengine.serving.options import ServerOptions
from tests.serving.running import Running, serving
from tests.serving.scripted_engine import ScriptedEngine
from tests.waiting import WAIT_SECONDS

KEYS = ("first-key", "second-key", "third-key")


def status_of(gate_kind: Any, headers: list[tuple[bytes, bytes]], argument: Any, path: str = "/v1/models") -> int:
    """The status that a gate answers with; 200 if it lets the request through."""
    statuses = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        statuses.append(200)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    async def receive() -> Any:
        raise AssertionError("a gate does not read the body")

    scope = {"type": "http", "path": path, "method": "GET", "headers": headers}
    asyncio.run(gate_kind(app, argument)(scope, receive, send))
    [status] = statuses
    return int(status)


def bearer(value: str) -> tuple[bytes, bytes]:
    return (b"authorization", value.encode())


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens(key: str) -> None:
    assert status_of(ApiKeyGate, [bearer(f"Bearer {key}")], KEYS) == 200
    assert status_of(ApiKeyGate, [bearer(f"bearer {key}")], KEYS) == 200
    assert status_of(ApiKeyGate, [(b"x-api-key", key.encode())], KEYS) == 200
    assert status_of(ApiKeyGate, [bearer("Bearer dummy"), (b"x-api-key", key.encode())], KEYS) == 200


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [bearer("Bearer ")],
        [bearer("Bearer")],
        [bearer("first-key")],
        [bearer("Basic first-key")],
        [bearer("Bearer first-key ")],
        [bearer("Bearer  first-key")],
        [bearer("Bearer FIRST-KEY")],
        [bearer("Bearer first-ke")],
        [bearer("Bearer " + "x" * 2**20)],
        [bearer("Bearer first-key"), bearer("Bearer wrong-key")],
        [bearer("Bearer first-key"), bearer("Bearer first-key")],
        [(b"x-api-key", b"first-key"), (b"x-api-key", b"wrong-key")],
        [(b"x-api-key", b"")],
        [(b"cookie", b"first-key")],
    ],
    ids=lambda headers: str(headers)[:50],
)
def test_anything_else_does_not(headers: list[tuple[bytes, bytes]]) -> None:
    assert status_of(ApiKeyGate, headers, KEYS) == 401
    assert status_of(ApiKeyGate, headers, KEYS, "/health") == 200


@pytest.mark.parametrize("key", [*KEYS, "no-such-key"])
def test_a_key_is_compared_with_every_known_one(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    num_compares = 0
    compare = auth.hmac.compare_digest

    def counting(a: bytes, b: bytes) -> bool:
        nonlocal num_compares
        num_compares += 1
        assert len(a) == len(b) == 32
        return compare(a, b)

    monkeypatch.setattr(auth.hmac, "compare_digest", counting)
    status_of(ApiKeyGate, [bearer(f"Bearer {key}")], KEYS)
    assert num_compares == len(KEYS)


MANY_KEYS = [f"key-number-{index:04}" for index in range(64)]


class EarlyLeaver(ApiKeyGate):
    """What a gate must not be."""

    def _matches(self, digest: bytes) -> bytes | None:
        return next((known for known in self._digests if auth.hmac.compare_digest(known, digest)), None)


def welch_t(gate: ApiKeyGate, keys: tuple[str, str]) -> float:
    """How surely the processor's time for one key is another than for the other, from 20,000 calls for each, mixed."""
    scopes = [{"headers": [bearer(f"Bearer {key}")]} for key in keys]
    kinds = random.Random(7).sample([0, 1] * 20_000, 40_000)
    times: tuple[list[int], list[int]] = ([], [])
    for kind in kinds:
        began = time.thread_time_ns()
        gate._matching_digest(scopes[kind])
        times[kind].append(time.thread_time_ns() - began)
    one, other = times
    error = (statistics.variance(one) / len(one) + statistics.variance(other) / len(other)) ** 0.5
    return (statistics.fmean(one) - statistics.fmean(other)) / error


@pytest.mark.long
@pytest.mark.parametrize(
    "keys",
    [(MANY_KEYS[0], MANY_KEYS[-1]), ("key-number-000x", "xey-number-0000")],
    ids=["the first and the last", "wrong at the end and at the beginning"],
)
def test_the_time_of_comparing_tells_nothing(keys: tuple[str, str]) -> None:
    found = welch_t(ApiKeyGate(nobody, MANY_KEYS), keys)
    print(f"t = {found:.2f}")
    assert abs(found) < 4.5


@pytest.mark.long
def test_the_time_of_leaving_early_would_tell() -> None:
    assert abs(welch_t(EarlyLeaver(nobody, MANY_KEYS), (MANY_KEYS[0], MANY_KEYS[-1]))) > 4.5


async def nobody(scope: Any, receive: Any, send: Any) -> None:
    """An application that is never asked."""


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    with serving(ScriptedEngine(), api_keys=KEYS) as running:
        yield running


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS", "DELETE", "PUT"])
@pytest.mark.parametrize(
    "path",
    [
        *("/v1/models", "//v1/models", "/v1/models/", "/V1/MODELS", "/v1/%6dodels", "/v1/../health", "/health/"),
        *(
            "/v1/messages",
            "//v1/messages",
            "/v1/messages/",
            "/V1/Messages",
            "/v1/messages/count_tokens",
            "/v1/messages?x=1",
        ),
        *("/v1/embeddings", "/tokenize", "/TOKENIZE", "//tokenize", "/detokenize", "/detokenize/", "/v1/tokenize"),
        *("/v1/chat/completions", "/v1/completions", "/version", "/docs", "/openapi.json", "/redoc", "/nothing", "//"),
        *("/web", "/web/", "/web/nothing.js", "/web/../v1/models", "/web/index.html", "/index.html", "/favicon.ico"),
        *("/v1/models?api_key=first-key", "/metrics", "/%2e%2e/health", "/health%2f..%2fv1/models"),
    ],
)
def test_no_way_around_the_gate(locked: Running, method: str, path: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", locked.port, timeout=WAIT_SECONDS)
    with closing(connection):  # This client sends a path as it is.
        connection.request(method, path)
        assert connection.getresponse().status == 401


def test_every_route_but_health_is_behind_the_gate(locked: Running) -> None:
    assert locked.get("/health").status_code == 200
    response = locked.get("/v1/models")
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"
    headers = {"authorization": "Bearer second-key"}
    assert locked.get("/v1/models", headers=headers).status_code == 200
    assert locked.get("/nothing", headers=headers).status_code == 404


@pytest.mark.parametrize(
    "headers", [{}, {"x-api-key": "wrong"}, {"x-api-key": ""}, {"authorization": "Basic first-key"}]
)
def test_anthropics_routes_say_so_in_its_shape(locked: Running, headers: dict[str, str]) -> None:
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        response = locked.post(path, {}, headers=headers)
        assert response.status_code == 401
        assert response.json()["type"] == "error"
        assert response.json()["error"]["type"] == "authentication_error"
        assert locked.post(path, {}, headers={"x-api-key": "first-key"}).status_code == 400


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/embeddings"])
def test_each_key_has_its_own_prefix_cache_by_every_route(locked: Running, path: str) -> None:
    salts = []
    body = {"model": "scripted", "input": "hi", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    for key in ("first-key", "first-key", "second-key"):
        assert locked.post(path, body, headers={"x-api-key": key}).status_code == 200
        salts.append(locked.engine.prepared[-1].cache_salt)
    assert salts[0] == salts[1] != ""
    assert salts[2] not in ("", salts[0])


def test_each_key_has_its_own_prefix_cache(locked: Running) -> None:
    salts = []
    for key, client_salt in (("first-key", None), ("first-key", None), ("second-key", None), ("first-key", "mine")):
        body = {"model": "scripted", "prompt": "hi", "max_tokens": 1, "cache_salt": client_salt}
        response = locked.post("/v1/completions", body, headers={"x-api-key": key})
        assert response.status_code == 200
        salts.append(locked.engine.prepared[-1].cache_salt)
    assert salts[0] == salts[1] != ""
    assert len(set(salts)) == 3


# The loopback guard


def host(value: str) -> tuple[bytes, bytes]:
    return (b"host", value.encode("latin-1"))


@pytest.mark.parametrize(
    "value", ["localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000", "[::1]", "LOCALHOST", "127.0.0.5"]
)
def test_own_names_pass(value: str) -> None:
    assert status_of(LoopbackGate, [host(value)], "127.0.0.5") == 200


@pytest.mark.parametrize(
    "value",
    [
        *("evil.example", "localhost.evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "localhost:x"),
        *("user@localhost", "localhost/x", "localhost#x", "::1", "0.0.0.0", "127.1", "[::1", "localhost:99999"),
    ],
)
def test_other_names_are_rebinding(value: str) -> None:
    assert status_of(LoopbackGate, [host(value)], "127.0.0.1") == 403


def test_the_host_header_must_be_there_once() -> None:
    assert status_of(LoopbackGate, [], "127.0.0.1") == 403
    assert status_of(LoopbackGate, [host("localhost"), host("evil.example")], "127.0.0.1") == 403


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:3000", 200),
        ("https://127.0.0.1", 200),
        ("http://[::1]:8000", 200),
        ("null", 403),
        ("https://evil.example", 403),
        ("http://localhost.evil.example", 403),
        ("file://localhost", 403),
        ("chrome-extension://abc", 403),
    ],
)
def test_web_pages_of_other_sites_are_kept_out(origin: str, status: int) -> None:
    headers = [host("localhost:8000"), (b"origin", origin.encode())]
    assert status_of(LoopbackGate, headers, "127.0.0.1") == status


def test_the_guard_over_sockets() -> None:
    with serving(ScriptedEngine()) as server:
        assert server.get("/v1/models").status_code == 200
        response = server.get("/v1/models", headers={"host": "evil.example"})
        assert response.status_code == 403
        assert response.json()["error"]["type"] == "permission_error"
        response = server.get("/v1/models", headers={"origin": "https://evil.example"})
        assert response.status_code == 403
        assert "access-control-allow-origin" not in response.headers


# Options


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", "::1", "127.9.9.9"])
def test_loopback_needs_no_key(address: str) -> None:
    assert is_loopback(address)
    check_exposure(address, (), False)


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.168.1.5", "example.org", "localhost.example.org", ""])
def test_anything_wider_needs_a_key_or_the_owners_word(address: str) -> None:
    with pytest.raises(ConfigError, match="--allow-no-auth"):
        check_exposure(address, (), False)
    check_exposure(address, ("some-key",), False)
    check_exposure(address, (), True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"host": "0.0.0.0"}, "--api-key"),
        ({"api_keys": ("",)}, "4"),
        ({"api_keys": ("abc",)}, "4"),
        ({"api_keys": ("with space",)}, "space"),
        ({"api_keys": ("schlüssel",)}, "ASCII"),
        ({"port": -1}, "port"),
        ({"port": 70000}, "port"),
        ({"port": True}, "port"),
        ({"max_queue": -1}, "max_queue"),
        ({"max_logprobs": -1}, "max_logprobs"),
        ({"drain_timeout": float("nan")}, "drain_timeout"),
        ({"ssl_keyfile": "key.pem"}, "--ssl-certfile"),
        ({"served_model_names": ("",)}, "name"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        ServerOptions(**options)
    for key in options.get("api_keys", ()):
        assert not key or key not in str(caught.value)
