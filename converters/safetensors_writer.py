"""Writing safetensors files whose bytes are known to be on the disk.

`checkpoint` has the layout. Invariant: when a write returns, the file is complete and synced; when it raises, a
WriteError names the file, what was to be written and why it was not. A file is written under the name that it is given:
whoever must not be seen half written writes into a folder that nobody reads (see `export_folder`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from converters.errors import WriteError

#: Bytes of one write: short enough that a full disk is noticed where it fills up.
_PART_BYTES = 16 * 2**20
_ALIGNMENT = 8
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, slots=True)
class Written:
    """A file that lies on the disk."""

    num_bytes: int
    sha256: str


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Written:
    """Write the tensors in their order, and sync the file.

    Raises:
        WriteError: if the disk is full, or anything else keeps the file from being written.
    """
    header = header_bytes(tensors, metadata)
    total = len(header) + tensor_bytes(tensors.values())
    return write_file(path, _parts(header, tensors.values()), total)


def header_bytes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """The length and the JSON, padded so that the data are aligned."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, tensor in tensors.items():
        end = position + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of their data."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def write_file(path: Path, parts: Iterable[bytes | memoryview], num_bytes: int) -> Written:
    """Write the parts one after the other, and sync the file.

    Args:
        num_bytes: of all parts, for the message.

    Raises:
        WriteError: if it cannot be done.
    """
    digest = hashlib.sha256()
    done = 0
    try:
        with open(path, "wb", buffering=0) as file:
            for part in parts:
                view = memoryview(part)
                digest.update(view)
                while len(view):
                    count = file.write(view)
                    done += count
                    view = view[count:]
            os.fsync(file.fileno())
    except OSError as error:
        raise write_error(path, num_bytes, done, error) from error
    return Written(done, digest.hexdigest())


def replace_file(path: Path, data: bytes) -> Written:
    """Write a small file, or replace it: whatever happens, the old or the new one is there, and whole.

    Raises:
        WriteError: if it cannot be done.
    """
    fresh = path.with_name(f"{path.name}.new")
    try:
        written = write_file(fresh, [data], len(data))
        os.replace(fresh, path)
    except OSError as error:
        raise write_error(path, len(data), 0, error) from error
    finally:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
    sync_folder(path.parent)
    return written


def make_folder(path: Path) -> None:
    """Make a folder, if it is not there.

    Raises:
        WriteError: if it cannot be done.
    """
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise write_error(path, 0, 0, error) from error


def write_error(path: Path, num_bytes: int, done: int, error: OSError) -> WriteError:
    """What went wrong with a file, in one line."""
    reason = error.strerror or str(error)
    advice = {
        errno.ENOSPC: "; free some space, or write to another disk",
        errno.EDQUOT: "; free some space, or write to another disk",
        errno.EFBIG: "; this file system or a limit (ulimit -f) does not allow files so large",
        errno.EROFS: "; write somewhere else",
        errno.EACCES: "; write somewhere else, or change its permissions",
    }.get(error.errno or 0, "")
    return WriteError(f"cannot write {path}: {reason} after {done} of {num_bytes} bytes{advice}")


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last.

    Raises:
        WriteError: if it cannot be done.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise WriteError(f"cannot sync {folder}: {error.strerror}") from error


def _parts(header: bytes, tensors: Iterable[torch.Tensor]) -> Iterator[bytes | memoryview]:
    yield header
    for tensor in tensors:
        if not tensor.numel():
            continue
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(data), _PART_BYTES):
            yield data[start : start + _PART_BYTES]
