"""JSON of answers that may be large, made a slice at a time and sent a block at a time.

Invariant: no call of the library's encoder, which lets no other thread run, sees more than a slice of a list, and no
write more than a block. Making it belongs in a thread; what is in it is the routes' business.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from typing import Any

from starlette.responses import Response, StreamingResponse

from qengine.serving.async_engine import AsyncEngine
from qengine.serving.errors import json_response

#: Answers with more log-probabilities than this are made in a thread.
_NUM_INLINE = 4096
#: Levels below an answer at which it has lists of log-probabilities; one more in responses.
LOGPROBS_DEPTH = 4
#: Items of a list that are encoded in one call. Each may hold the likeliest tokens of a place and their bytes.
_SLICE = 256
_BLOCK_BYTES = 256 * 1024
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def large_json(value: Mapping[str, Any], *, depth: int = 1) -> list[bytes]:
    """`value` as JSON, in blocks.

    Args:
        depth: how many levels below `value` there are containers that hold long lists; those further down are small.
    """
    blocks: list[bytes] = []
    held: list[str] = []
    num_chars = 0
    for part in _parts(value, depth):
        held.append(part)
        num_chars += len(part)
        if num_chars >= _BLOCK_BYTES:
            blocks.append("".join(held).encode())
            held, num_chars = [], 0
    return [*blocks, "".join(held).encode()]


def _parts(value: Any, depth: int) -> Iterator[str]:
    if isinstance(value, list) and value:
        nested = depth > 0 and isinstance(value[0], dict | list)
        yield from _list_parts(value, depth - 1) if nested else _slices(value)
    elif isinstance(value, dict) and value and depth >= 0:
        opener = "{"
        for key, item in value.items():
            yield f"{opener}{_ENCODER.encode(key)}:"
            yield from _parts(item, depth - 1)
            opener = ","
        yield "}"
    else:
        yield _ENCODER.encode(value)


def _list_parts(items: Sequence[Any], depth: int) -> Iterator[str]:
    opener = "["
    for item in items:
        yield opener
        yield from _parts(item, depth)
        opener = ","
    yield "]"


def _slices(items: Sequence[Any]) -> Iterator[str]:
    opener = "["
    for start in range(0, len(items), _SLICE):
        yield opener + _ENCODER.encode(items[start : start + _SLICE])[1:-1]
        opener = ","
    yield "]"


def large_response(blocks: Sequence[bytes]) -> Response:
    """The answer that sends `blocks`, each when the client has taken those before."""
    headers = {"Content-Length": str(sum(len(block) for block in blocks))}
    return StreamingResponse(_each(blocks), headers=headers, media_type="application/json")


async def _each(blocks: Sequence[bytes]) -> AsyncGenerator[bytes, None]:
    for block in blocks:
        yield block


async def answer_with_logprobs(
    engine: AsyncEngine, make: Callable[[], Mapping[str, Any]], num_logprobs: int, *, depth: int = LOGPROBS_DEPTH
) -> Response:
    """The response with what `make` makes, in a thread if that takes long.

    Args:
        num_logprobs: how many log-probabilities it holds.
        depth: as of `large_json`.
    """
    if num_logprobs <= _NUM_INLINE:
        return json_response(make())
    return large_response(await engine.offload(lambda: large_json(make(), depth=depth), is_long=True))
