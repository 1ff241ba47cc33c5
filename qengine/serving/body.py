"""Reading a request's body: the way from untrusted bytes to a checked JSON object.

Invariant: what comes out is a dict whose depth, keys, numbers and strings are within `limits`: no NaN or infinity, no
NUL, no lone surrogate, no integer of a thousand digits. It knows nothing of the fields' meaning; protocol does.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from qengine.serving.admission import QueueFullError, Share
from qengine.serving.errors import ApiError, as_api_error, invalid, shorten
from qengine.serving.limits import LIMITS
from qengine.serving.service import begin_call, service_of

# As every digit is 0 here, and no sign is left, digits or exponents that are too long are found at the speed of memory.
_ZEROS = bytes.maketrans(b"123456789E", b"000000000e")
_LONG_NUMBERS = (b"0" * (LIMITS.json_int_digits + 1), b"0e000")
_T = TypeVar("_T")
_Container = dict[str, Any] | list[Any]


class ClientGoneError(Exception):
    """The client closed the connection; nobody reads an answer."""


async def read_json(request: Request, meaning: Callable[[dict[str, Any]], _T]) -> _T:
    """What `meaning` makes of the body, a JSON object. Of a large body it does so in a thread.

    Raises:
        ApiError: 400, 408, 413, 415 or 429, saying what was found and what was expected; and what `meaning` raises.
        ClientGoneError: the client left while sending.
    """
    _check_headers(request)
    with service_of(request).bodies.reserve() as share:
        try:
            body = await asyncio.wait_for(_read(request, share), LIMITS.body_seconds)
        except asyncio.TimeoutError as error:
            message = f"the body did not arrive within {LIMITS.body_seconds:g} seconds"
            raise ApiError(408, message, headers={"Connection": "close"}) from error
        except ClientDisconnect as error:
            raise ClientGoneError from error
        begin_call(request)
        if len(body) <= LIMITS.small_body_bytes:
            return meaning(parse_json_object(body))
        # In a thread: some milliseconds of it must not stall every stream.
        return await asyncio.to_thread(lambda: meaning(parse_json_object(body)))


def _check_headers(request: Request) -> None:
    content_type = request.headers.get("content-type", "")
    if content_type.split(";")[0].strip().lower() != "application/json":
        found = shorten(content_type) if content_type else "missing"
        raise ApiError(415, f"Content-Type is {found}, expected application/json")
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise ApiError(415, f"Content-Encoding is {shorten(encoding)}, expected a plain body")


async def _read(request: Request, share: Share) -> bytes:
    """The bytes, counted as they come: Content-Length is only believed when it is too large."""
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared[:20]) > LIMITS.body_bytes:
        raise _too_large()
    chunks: list[bytes] = []
    num_bytes = 0
    async for chunk in request.stream():
        num_bytes += len(chunk)
        if num_bytes > LIMITS.body_bytes:
            raise _too_large()
        try:
            share.grow(len(chunk), must_fit=num_bytes > LIMITS.small_body_bytes)
        except QueueFullError as error:
            raise _too_many(error) from error
        chunks.append(chunk)
    return b"".join(chunks)


def _too_large() -> ApiError:
    message = f"the body is larger than {LIMITS.body_bytes} bytes; send a shorter prompt"
    return ApiError(413, message, headers={"Connection": "close"})


def _too_many(error: QueueFullError) -> ApiError:
    """The rest of the body is not read, so the connection ends with it."""
    problem = as_api_error(error)
    return ApiError(
        problem.status, str(problem), code="bodies_full", headers={**problem.headers, "Connection": "close"}
    )


def parse_json_object(body: bytes) -> dict[str, Any]:
    """Parse and check the bytes of a body.

    Raises:
        ApiError: 400.
    """
    if body.count(b",") > LIMITS.json_items:  # Those in strings count too: a bound on work, not on meaning.
        raise invalid(f"the body has more than {LIMITS.json_items} items (commas); send less")
    # Calling back for every number makes parsing ten times slower, so only where a number could be out of bounds.
    hooks: dict[str, Any] = {"parse_constant": _refuse_constant}
    if _may_hold_long_number(body):
        hooks.update(parse_int=_bounded_int, parse_float=_finite_float)
    try:
        value = json.loads(body.decode("utf-8"), **hooks)
    except UnicodeDecodeError as error:
        raise invalid(f"the body is not UTF-8: byte {error.start} is wrong") from error
    except json.JSONDecodeError as error:
        raise invalid(f"the body is not valid JSON: {error.msg} at character {error.pos}") from error
    except RecursionError as error:
        raise _too_deep() from error
    if not isinstance(value, dict):
        raise invalid(f"the body is a JSON {_json_kind(value)}, expected an object")
    _check_nesting(value)
    if b"\\u" in body:  # Only an escape can make a character that raw UTF-8 JSON cannot hold.
        _check_strings(value)
    return value


def _may_hold_long_number(body: bytes) -> bool:
    """Whether a number could be out of bounds; what looks like one inside a string costs time only."""
    zeros = body.translate(_ZEROS, b"+")
    return any(number in zeros for number in _LONG_NUMBERS)


def _refuse_constant(name: str) -> float:
    raise invalid(f"the body holds {name}, which is not JSON; send a finite number")


def _bounded_int(digits: str) -> int:
    if len(digits) > LIMITS.json_int_digits:
        raise invalid(f"the body holds an integer of {len(digits)} digits, expected at most {LIMITS.json_int_digits}")
    return int(digits)


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise invalid(f"the body holds the number {text[:40]}, which is too large")
    return value


def _too_deep() -> ApiError:
    return invalid(f"the body is nested more than {LIMITS.json_depth} levels deep")


def _json_kind(value: object) -> str:
    kinds = {list: "array", str: "string", bool: "boolean", type(None): "null"}
    return kinds.get(type(value), "number")


def _values(container: _Container) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container


def _levels(root: dict[str, Any]) -> Iterator[list[_Container]]:
    """The objects and arrays, level by level from the root, without recursion."""
    level: list[_Container] = [root]
    while level:
        yield level
        level = [value for container in level for value in _values(container) if type(value) in (list, dict)]


def _check_nesting(root: dict[str, Any]) -> None:
    num_keys = 0
    for depth, level in enumerate(_levels(root), start=1):
        if depth > LIMITS.json_depth:
            raise _too_deep()
        num_keys += sum(len(container) for container in level if isinstance(container, dict))
        if num_keys > LIMITS.json_keys:
            raise invalid(f"the body has more than {LIMITS.json_keys} keys")


def _check_strings(root: dict[str, Any]) -> None:
    for level in _levels(root):
        for container in level:
            if isinstance(container, dict):
                for key in container:
                    _check_text(key)
            for value in _values(container):
                if isinstance(value, str):
                    _check_text(value)


def _check_text(text: str) -> None:
    if "\0" in text:
        raise invalid("the body holds a NUL character (\\u0000); remove it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise invalid("the body holds half of a surrogate pair, which is no character; send whole ones") from error
