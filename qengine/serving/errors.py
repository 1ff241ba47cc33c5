"""Every error a client can see, in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``.

On the routes of Anthropic's API it is ``{"type": "error", "error": {"type", "message"}}`` instead.
Invariant: whatever goes wrong, the body has this shape and names no file, stack or secret of the server. Validation is
always status 400. This module decides status and wording; whether a stream has begun is streaming's business.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from qengine.errors import EngineDeadError, QEngineError, RequestError
from qengine.serving.admission import (
    NotAcceptingError,
    QueueFullError,
    QueueTimeoutError,
    RequestTimeoutError,
    ShutDownError,
)
from qengine.serving.limits import LIMITS

logger = logging.getLogger(__name__)

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
#: Anthropic's names for the kinds of errors.
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_ANTHROPIC_ROUTES = ("/v1/messages", "/v1/messages/")
_SHOWN_ITEMS = 8


class ApiError(QEngineError):
    """An answer that is an error.

    Attributes:
        status: the HTTP status.
        param: the offending field, such as "messages[0].role", or None.
        code: machine-readable reason, or None.
        headers: further response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        return _TYPES.get(self.status, default)

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}


def anthropic_error(error: ApiError) -> dict[str, Any]:
    """Anthropic's error object."""
    default = "api_error" if error.status >= 500 else "invalid_request_error"
    return {"type": "error", "error": {"type": _ANTHROPIC_TYPES.get(error.status, default), "message": str(error)}}


def invalid(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400."""
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str, code: str, *, retry_after: int = LIMITS.retry_after_seconds) -> ApiError:
    """A 503 with Retry-After."""
    return ApiError(503, message, code=code, headers={"Retry-After": str(retry_after)})


def shorten(value: object) -> str:
    """A JSON value for a message, cut to a bounded length."""
    if isinstance(value, str):
        text = f"'{value[: LIMITS.shown_chars + 1]}'"
    elif isinstance(value, list | dict) and len(value) > _SHOWN_ITEMS:
        text = f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)} items"
    else:
        text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LIMITS.shown_chars + 2 else text[: LIMITS.shown_chars] + "..."


def as_api_error(error: BaseException) -> ApiError:
    """The answer for any exception. What was not foreseen becomes a 500 that tells nothing, and is logged in full."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return invalid(str(error), param=error.param, code=error.code)
    if isinstance(error, QueueFullError):
        headers = {"Retry-After": str(LIMITS.retry_after_seconds)}
        return ApiError(429, str(error), code="queue_full", headers=headers)
    if isinstance(error, NotAcceptingError | ShutDownError):
        return unavailable(str(error), "draining")
    if isinstance(error, HTTPException):
        return _from_http(error)
    if isinstance(error, QueueTimeoutError | RequestTimeoutError | EngineDeadError):
        return _from_engine(error)
    logger.error("unexpected error while answering a request", exc_info=error)
    return ApiError(500, "the server met an unexpected error; its log has the details", code="internal_error")


def _from_engine(error: QueueTimeoutError | RequestTimeoutError | EngineDeadError) -> ApiError:
    if isinstance(error, QueueTimeoutError):
        return unavailable(str(error), "queue_timeout")
    if isinstance(error, RequestTimeoutError):
        return ApiError(504, str(error), code="request_timeout")
    return ApiError(500, str(error), code="engine_dead")


def _from_http(error: HTTPException) -> ApiError:
    """Routing errors: the framework raises these for unknown paths and methods."""
    codes = {404: "route_not_found", 405: "method_not_allowed"}
    messages = {404: "there is no such route", 405: "this route does not take this method"}
    message = messages.get(error.status_code) or HTTPStatus(error.status_code).phrase
    return ApiError(error.status_code, message, code=codes.get(error.status_code), headers=error.headers)


def json_response(content: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """`content` as JSON; a NaN would be a bug of ours and raises."""
    body = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    return Response(body, status, headers=dict(headers or {}), media_type="application/json")


def error_response(error: BaseException, path: str) -> Response:
    """The whole HTTP answer for an exception, in the shape of the API that `path` belongs to."""
    api_error = as_api_error(error)
    is_anthropic = path == _ANTHROPIC_ROUTES[0] or path.startswith(_ANTHROPIC_ROUTES[1])
    body = anthropic_error(api_error) if is_anthropic else api_error.body()
    return json_response(body, api_error.status, api_error.headers)


def install_error_handlers(app: FastAPI, on_error: Callable[[ApiError], None] | None = None) -> None:
    """Make every exception that leaves a route an answer in its API's shape, and tell `on_error` of it."""

    async def handle(request: Request, error: Exception) -> Response:
        api_error = as_api_error(error)
        if on_error is not None:
            on_error(api_error)
        return error_response(api_error, request.scope["path"])

    for kind in (QEngineError, HTTPException, Exception):
        app.add_exception_handler(kind, handle)
