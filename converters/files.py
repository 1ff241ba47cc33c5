"""Bounded reading of files that may be broken, hostile, or changing.

Invariant: nothing is allocated before its size has been compared with the file's own, and every failure of the
operating system or of a decoder becomes a CheckpointError that names the file. Files are read, not mapped: one that
shrinks meanwhile is an error message and not a signal that ends the process.
"""

from __future__ import annotations

import json
import os
import reprlib
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.errors import CheckpointError

#: config.json and its companions are a few KB.
MAX_JSON_BYTES = 4 * 2**20
#: Brackets and commas. Each value of a JSON text has one, and may take 300 bytes of memory for 10 bytes of text.
MAX_JSON_MARKS = 2**18
#: Bytes of one read: enough for a disk's full speed, and short enough to be stopped in between.
_PART_BYTES = 16 * 2**20
_MAX_SHOWN_CHARS = 120
#: Of a list or mapping it looks at the first few items alone.
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = _MAX_SHOWN_CHARS

Bytes = npt.NDArray[np.uint8]


def shown(text: object) -> str:
    """Something out of a file as an error message can carry it: one short printable line, made at little cost."""
    line = str(text) if isinstance(text, str | Path | BaseException) else _BRIEF.repr(text)
    if len(line) > _MAX_SHOWN_CHARS:
        line = line[:_MAX_SHOWN_CHARS] + "..."
    return line if line.isprintable() else repr(line)


@dataclass(frozen=True, slots=True)
class DataFile:
    """A regular file as it was when first looked at; a later read of a changed one is refused."""

    path: Path
    num_bytes: int
    modified_ns: int

    @staticmethod
    def at(path: Path) -> DataFile:
        """Look at the file.

        Raises:
            CheckpointError: if it does not exist, cannot be reached, or is a folder, pipe or device.
        """
        try:
            status = path.stat()
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot open {shown(path)}: {_reason(error)}") from error
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{shown(path)} is not a regular file")
        return DataFile(path, status.st_size, status.st_mtime_ns)

    def open(self) -> OpenFile:
        """For several reads; use it in a `with`.

        Raises:
            CheckpointError: if it cannot be opened any more.
        """
        try:
            return OpenFile(self, os.open(self.path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {_reason(error)}") from error

    def read(self, offset: int, num_bytes: int) -> Bytes:
        """uint8 [num_bytes] from `offset` on. The caller has checked that the file holds them.

        Raises:
            CheckpointError: if the file changed, or cannot be read.
        """
        with self.open() as file:
            return file.read(offset, num_bytes)

    def read_bytes(self, offset: int, num_bytes: int) -> bytes:
        """The same as bytes."""
        return self.read(offset, num_bytes).tobytes()


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A DataFile with its descriptor."""

    file: DataFile
    descriptor: int

    def __enter__(self) -> OpenFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Once."""
        os.close(self.descriptor)

    def read(self, offset: int, num_bytes: int) -> Bytes:
        """uint8 [num_bytes] from `offset` on.

        Raises:
            CheckpointError: if the file changed, or cannot be read.
        """
        data = np.empty(num_bytes, dtype=np.uint8)
        self.read_into(data, offset)
        return data

    def read_into(self, data: Bytes, offset: int, after_part: Callable[[int], None] | None = None) -> None:
        """Fill `data` from `offset` on, in large reads.

        Args:
            after_part: told the bytes of every part that was read; what it raises ends the reading.

        Raises:
            CheckpointError: if the file changed, or cannot be read.
        """
        target, num_bytes, done = data.data, len(data), 0
        assert 0 <= offset <= offset + num_bytes <= self.file.num_bytes, "ranges are checked when the header is read"
        try:
            self._require_unchanged()
            while done < num_bytes:
                got = os.preadv(self.descriptor, [target[done : done + _PART_BYTES]], offset + done)
                if not got:
                    raise CheckpointError(f"{self.file.path} ended {num_bytes - done} bytes too early")
                done += got
                if after_part is not None:
                    after_part(got)
        except OSError as error:
            raise CheckpointError(f"cannot read {self.file.path}: {_reason(error)}") from error

    def _require_unchanged(self) -> None:
        status = os.fstat(self.descriptor)
        if (status.st_size, status.st_mtime_ns) != (self.file.num_bytes, self.file.modified_ns):
            raise CheckpointError(f"{self.file.path} changed while it was being loaded; load the model again")


def parse_json_object(data: bytes, what: str, *, unique_keys: bool = False) -> dict[str, Any]:
    """UTF-8 JSON text that must be an object.

    Raises:
        CheckpointError: naming `what`, if it is not, is nested too deeply, has too many values, or (on demand) has a
            key twice.
    """
    marks = sum(map(data.count, (b"{", b"[", b",")))
    if marks > MAX_JSON_MARKS:
        raise CheckpointError(f"{what} has {marks} brackets and commas, at most {MAX_JSON_MARKS} are read")
    hook = _refuse_repeated_keys if unique_keys else None
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=hook)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not valid JSON: {shown(error) or type(error).__name__}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} holds a JSON {type(value).__name__}, expected an object")
    return value


def read_json_object(path: Path, *, max_bytes: int = MAX_JSON_BYTES, unique_keys: bool = False) -> dict[str, Any]:
    """A JSON file that must hold an object and be no larger than `max_bytes`.

    Raises:
        CheckpointError: if it is missing, too large, or no JSON object.
    """
    file = DataFile.at(path)
    if file.num_bytes > max_bytes:
        raise CheckpointError(f"{path} has {file.num_bytes} bytes, at most {max_bytes} are expected")
    return parse_json_object(file.read_bytes(0, file.num_bytes), str(path), unique_keys=unique_keys)


def list_folder(folder: Path) -> list[str]:
    """Names in the folder, sorted.

    Raises:
        CheckpointError: if it cannot be read.
    """
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}: {_reason(error)}") from error


def is_inside(path: Path) -> bool:
    """Whether a file lies in the folder of its path, or below, after links are followed too.

    The hub's cache is the one exception: a snapshot's files, and those of its folders, are links into the ``blobs``
    folder beside ``snapshots``.
    """
    root, file = Path(os.path.realpath(path.parent)), Path(os.path.realpath(path))
    blobs = [above.parent / "blobs" for above in list(root.parents)[:2] if above.name == "snapshots"]
    return root in file.parents or file.parent in blobs


def _refuse_repeated_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key '{shown(repeated)}' occurs twice")
    return result


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or shown(error)
