"""JSON from strangers: bounded in size and depth, objects only, no duplicate keys.

Invariant: whatever the bytes, the result is a dict or a `CheckpointError` that names the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError

MAX_CONFIG_BYTES = 16 * 2**20


def read_json_object(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: if it cannot be read, is larger than `max_bytes`, or holds no object.
    """
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise CheckpointError(f"{path} has {size} bytes, at most {max_bytes} are read")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    return parse_json_object(data, str(path))


def parse_json_object(data: bytes, where: str, what: str = "file") -> dict[str, Any]:
    """The object in JSON bytes; see `read_json_object`."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: the {what} is not UTF-8: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise CheckpointError(f"{where}: the {what} nests too deeply to be a model's") from error
    except ValueError as error:
        raise CheckpointError(f"{where}: the {what} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: the {what} holds {type(value).__name__}, expected an object")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise ValueError(f"duplicate key '{twice[:100]}'")
    return result
