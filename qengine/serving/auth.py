"""Who may talk to the server: API keys, and on a loopback address without keys the guard against web pages.

Invariant: these are pure ASGI layers around the whole application, so no route, mount or error page can be reached
around them; only OPEN_PATHS are answered without a key. A key is compared as a SHA-256 digest with every known key, in
the same time wherever it matches, and is never logged. This module does not bind sockets; server does.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
from collections import Counter
from collections.abc import Sequence, Set
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from qengine.serving.errors import ApiError, error_response, shorten
from qengine.serving.limits import LIMITS
from qengine.serving.metrics.exposition import Monitoring
from qengine.serving.page import PAGE_PATHS

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health"}) | PAGE_PATHS
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


class ApiKeyGate:
    """Lets a request pass if it carries one of the keys, as ``Authorization: Bearer`` or ``x-api-key``.

    With several keys, each has its own prefix cache: which prompts one has sent cannot be timed by another.

    Args:
        open_paths: are answered without a key.
        max_concurrency: POST requests that may be under way with one key; None for any number.
        monitoring: is told of who was turned away.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[str],
        *,
        open_paths: Set[str] = OPEN_PATHS,
        max_concurrency: int | None = None,
        monitoring: Monitoring | None = None,
    ) -> None:
        self._app = app
        self._open_paths = open_paths
        self._max_concurrency = max_concurrency
        self._monitoring = monitoring
        self._num_under_way: Counter[bytes] = Counter()
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._salt_secret = secrets.token_bytes(32)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._open_paths:
            await self._app(scope, receive, send)
            return
        digest = self._matching_digest(scope)
        if digest is None:
            await error_response(self._no_key(), scope["path"])(scope, receive, send)
            return
        if len(self._digests) > 1:
            salt = hmac.new(self._salt_secret, digest, hashlib.sha256).hexdigest()
            scope.setdefault("state", {})["cache_salt"] = salt
        if self._max_concurrency is None or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if self._num_under_way[digest] >= self._max_concurrency:
            await error_response(self._too_many(), scope["path"])(scope, receive, send)
            return
        self._num_under_way[digest] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._num_under_way[digest] -= 1

    def _no_key(self) -> ApiError:
        if self._monitoring is not None:
            self._monitoring.auth_failed()
        return ApiError(
            401,
            "the API key is missing or wrong; send it as 'Authorization: Bearer <key>' or 'x-api-key: <key>'",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def _too_many(self) -> ApiError:
        if self._monitoring is not None:
            self._monitoring.rejected("key_concurrency")
        return ApiError(
            429,
            f"this API key has {self._max_concurrency} requests under way, as many as it may have; try again later",
            code="key_concurrency",
            headers={"Retry-After": str(LIMITS.retry_after_seconds)},
        )

    def _matching_digest(self, scope: Scope) -> bytes | None:
        """The digest of a presented key that is known. A header given twice presents nothing."""
        presented: list[bytes] = []
        bearer = _header_values(scope, b"authorization")
        if len(bearer) > 1:
            return None
        if bearer and bearer[0][:7].lower() == b"bearer ":
            presented.append(bearer[0][7:])
        plain = _header_values(scope, b"x-api-key")
        if len(plain) == 1:
            presented.append(plain[0])
        matches = [self._matches(hashlib.sha256(key).digest()) for key in presented]
        return next((match for match in matches if match is not None), None)

    def _matches(self, digest: bytes) -> bytes | None:
        found: bytes | None = None
        for known in self._digests:  # All of them: leaving early would tell where a match is.
            if hmac.compare_digest(known, digest):
                found = known
        return found


class LoopbackGate:
    """For a loopback server without keys: refuses requests that a web page could have caused.

    The Host header must name this machine (else it may be another site's name pointed here, DNS rebinding), and an
    Origin, which browsers send and programs do not, must be of this machine or one of `origins` ("*" is any).
    """

    def __init__(self, app: ASGIApp, host: str, origins: Sequence[str] = ()) -> None:
        self._app = app
        self._names = _LOOPBACK_NAMES | {host.lower()}
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            problem = self._problem(scope)
            if problem is not None:
                await error_response(ApiError(403, problem, code="forbidden"), scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _problem(self, scope: Scope) -> str | None:
        hosts = _header_values(scope, b"host")
        if len(hosts) != 1 or not self._is_ours("//" + hosts[0].decode("latin-1")):
            shown = shorten(hosts[0].decode("latin-1")) if hosts else "missing"
            return f"the Host header is {shown}, expected localhost; start with --api-key to serve other names"
        for origin in (value.decode("latin-1") for value in _header_values(scope, b"origin")):
            if not (self._is_ours(origin) or self._origins & {origin, "*"}):
                return (
                    "requests from web pages of other sites are refused; "
                    "start with --allowed-origins or --api-key to allow them"
                )
        return None

    def _is_ours(self, url: str) -> bool:
        try:
            parts = urlsplit(url)
            _ = parts.port  # Raises for a port that is none.
        except ValueError:
            return False
        has_more = bool(parts.path or parts.query or parts.fragment or parts.username is not None)
        return not has_more and parts.scheme in ("", "http", "https") and parts.hostname in self._names


class HeaderCountGate:
    """Refuses requests with an unreasonable number of headers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and len(scope["headers"]) > LIMITS.num_headers:
            message = f"the request has {len(scope['headers'])} headers, expected at most {LIMITS.num_headers}"
            await error_response(ApiError(431, message), scope["path"])(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _header_values(scope: Scope, name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key.lower() == name]
