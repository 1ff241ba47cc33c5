"""Bounded reading of a tokenizer's files, which come from strangers.

Invariant: a file is opened without waiting, must be a regular one of the folder it is looked for in, after links are
followed too, and is read only as far as it said it goes; every failure of the operating system is a LoadError that
names the file. A link to a file of the user's would show it to clients, or put it into what is published.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from converters.files import is_inside
from qengine.errors import LoadError
from qengine.tokenizer.rust_errors import shorten

#: tokenizer_config.json and its kind: with all added tokens some have 1 MB.
MAX_CONFIG_BYTES = 2**23
#: Values of such a file; with 6,000 added tokens some have 60,000.
MAX_CONFIG_VALUES = 2**18
_MAX_SHOWN_PATH = 300


def is_there(path: Path) -> bool:
    """Whether something is at `path`; a link to nothing is nothing.

    Raises:
        LoadError: if the system cannot say.
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    return True


def names_in(folder: Path) -> list[str]:
    """Names in a folder of a model's folder, sorted; none if it is not there.

    Raises:
        LoadError: if it cannot be read, or is a link out of the model's folder.
    """
    if is_there(folder):
        _require_inside(folder)
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError) as error:
        raise _unreadable(folder, error) from error


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """A file's bytes.

    Raises:
        LoadError: if it is no regular file, a link out of the model's folder, larger than files of its kind are, or
            gives other than it said.
    """
    _require_inside(path)
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise LoadError(f"{_shown(path)} is not a regular file")
            if status.st_size > max_bytes:
                raise LoadError(
                    f"{_shown(path)} has {status.st_size} bytes, at most {max_bytes} are expected; download it again"
                )
            data = file.read(status.st_size + 1)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if len(data) != status.st_size:
        raise LoadError(f"{_shown(path)} has {status.st_size} bytes but gives others; copy it to a disk")
    return data


def read_text(path: Path, max_bytes: int) -> str:
    """A file's text.

    Raises:
        LoadError: as `read_bytes`, or if it is not UTF-8.
    """
    try:
        return read_bytes(path, max_bytes).decode("utf-8")
    except ValueError as error:
        raise _unreadable(path, error) from error


def read_json(path: Path) -> dict[str, Any]:
    """A configuration file's object; empty if there is no such file.

    Raises:
        LoadError: as `read_bytes`, or if it is no JSON object or has too many values.
    """
    if not is_there(path):
        return {}
    data = read_bytes(path, MAX_CONFIG_BYTES)
    num_values = sum(map(data.count, (b"{", b"[", b",")))
    if num_values > MAX_CONFIG_VALUES:
        raise LoadError(f"{path} has {num_values} values, at most {MAX_CONFIG_VALUES} are expected")
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{path} is not readable JSON ({shorten(str(error))}); download the file again") from error
    if not isinstance(value, dict):
        raise LoadError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def _open_at_once(path: str, flags: int) -> int:
    """A pipe without a writer is no reason to wait. Whatever fails then, `open` closes it again."""
    return os.open(path, flags | os.O_NONBLOCK)


def _require_inside(path: Path) -> None:
    """Follow no link out of the folder of `path`, but for those of the hub's cache."""
    try:
        is_own = is_inside(path)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if not is_own:
        raise LoadError(
            f"{_shown(path)} is a link to a file outside the model's folder, {_shown(Path(os.path.realpath(path)))}; "
            "put the file itself there"
        )


def _unreadable(path: Path, error: Exception) -> LoadError:
    reason = (error.strerror if isinstance(error, OSError) else None) or shorten(str(error))
    return LoadError(f"cannot read {_shown(path)}: {reason}")


def _shown(path: Path) -> str:
    text = str(path)
    return text if len(text) <= _MAX_SHOWN_PATH else text[:_MAX_SHOWN_PATH] + "..."
