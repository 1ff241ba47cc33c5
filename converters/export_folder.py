"""OutputFolder: a checkpoint that appears all at once, under its own name, or not at all.

Everything is written to ``OUT.partial`` and synced; ``manifest.json``, with the SHA-256 of every file, comes last; then
the folder is renamed to OUT. Invariant: at any moment, whatever ends the program, OUT either does not exist or is
complete, and nothing that existed before is touched. Loading refuses folders named ``.partial``. Below ``work`` lies
what a later run needs to go on; it is gone before the rename.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from converters.errors import CheckpointError, WriteError
from converters.files import DataFile, read_json_object
from converters.manifest import MANIFEST
from converters.safetensors_writer import Written, sync_folder, write_file, write_safetensors

SUFFIX = ".partial"
#: Names a folder as ours, so that only such a one is ever removed.
_MARK = ".qengine-export"
_WORK = "work"
_PART_BYTES = 16 * 2**20
_SLACK = 1.1


class OutputFolder:
    """A folder that is being written. Use `create`, and `finish` or `discard`."""

    def __init__(self, out: Path, partial: Path, lock: int) -> None:
        self.out = out
        self.partial = partial
        self._lock = lock
        self._files: dict[str, Written] = {}

    @classmethod
    def create(cls, out: Path, *, source: Path | None = None, resume: bool | None = False) -> OutputFolder:
        """Begin to write `out`.

        Args:
            source: the model that is read, which must not be written over.
            resume: True goes on with what an earlier run left, if it left something; False refuses to touch it; None
                begins anew.

        Raises:
            CheckpointError: if `out` exists, is `source`, or an earlier run's work is in the way.
            WriteError: if the folder cannot be made.
        """
        out = _absolute(out)
        _check_free(out, source)
        partial = out.with_name(out.name + SUFFIX)
        if not _is_ours(partial):
            raise CheckpointError(f"{partial} is in the way and was not written by an export; move it away")
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            partial.mkdir(exist_ok=True)
            (partial / _MARK).touch()
            lock = _lock(partial)
        except OSError as error:
            raise WriteError(f"cannot write to {partial}: {error.strerror}; choose another place") from error
        folder = cls(out, partial, lock)
        if resume is None or not folder.work.is_dir():
            folder._empty()
        elif not resume:
            os.close(lock)
            raise CheckpointError(
                f"{partial} holds the work of an earlier run that did not end: --resume goes on with it; to begin "
                "anew, remove that folder"
            )
        return folder

    @property
    def work(self) -> Path:
        """Where a run keeps what a later one needs to go on; the caller makes it."""
        return self.partial / _WORK

    # Writing

    def write_tensors(self, name: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
        """A safetensors file. Raises WriteError."""
        self._files[name] = write_safetensors(self.partial / name, tensors, metadata)

    def write_text(self, name: str, text: str) -> None:
        """A text file. Raises WriteError."""
        data = text.encode()
        self._files[name] = write_file(self.partial / name, [data], len(data))

    def write_json(self, name: str, value: Any) -> None:
        """A JSON file. Raises WriteError."""
        self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def copy(self, path: Path) -> None:
        """A file of another folder, under its own name.

        Raises:
            WriteError: if it cannot be written.
            CheckpointError: if it cannot be read.
        """
        file = DataFile.at(path)
        parts = (
            file.read_bytes(start, min(_PART_BYTES, file.num_bytes - start))
            for start in range(0, file.num_bytes, _PART_BYTES)
        )
        self._files[path.name] = write_file(self.partial / path.name, parts, file.num_bytes)

    def rename(self, old: str, new: str) -> None:
        """A file that was written, under another name. Raises WriteError."""
        try:
            os.rename(self.partial / old, self.partial / new)
        except OSError as error:
            raise WriteError(f"cannot rename {self.partial / old}: {error.strerror}") from error
        self._files[new] = self._files.pop(old)

    # The end

    def finish(self, about: Mapping[str, Any]) -> None:
        """Write the manifest, and give the folder its name.

        Args:
            about: entries of the manifest beside the files.

        Raises:
            WriteError: if it cannot be done.
        """
        self._remove(self.work)
        for name in set(os.listdir(self.partial)) - set(self._files) - {_MARK}:
            self._remove(self.partial / name)
        files = {name: {"bytes": f.num_bytes, "sha256": f.sha256} for name, f in sorted(self._files.items())}
        self.write_json(MANIFEST, {**about, "files": files})
        self._remove(self.partial / _MARK)
        sync_folder(self.partial)
        try:
            os.rename(self.partial, self.out)
        except OSError as error:
            raise WriteError(f"cannot rename {self.partial} to {self.out}: {error.strerror}") from error
        sync_folder(self.out.parent)
        self.close()

    def discard(self) -> None:
        """Remove all that was written."""
        with contextlib.suppress(OSError):
            shutil.rmtree(self.partial)
        self.close()

    def close(self) -> None:
        """Let go of the folder, leaving what is in it."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _empty(self) -> None:
        for name in os.listdir(self.partial):
            if name != _MARK:
                self._remove(self.partial / name)

    @staticmethod
    def _remove(path: Path) -> None:
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise WriteError(f"cannot remove {path}: {error.strerror}") from error


@contextlib.contextmanager
def discarding(folder: OutputFolder) -> Iterator[OutputFolder]:
    """Whatever ends the block but its own end removes what was written."""
    try:
        yield folder
    except BaseException:
        folder.discard()
        raise


def replace_text(out: Path, name: str, change: Callable[[str], str]) -> None:
    """Change a text file of a finished checkpoint, and its line in the manifest. Each is replaced at once.

    Raises:
        CheckpointError: if one of them is not there.
        WriteError: if they cannot be written; what was there stays.
    """
    file, manifest_file = out / name, out / MANIFEST
    manifest = read_json_object(manifest_file)
    status = DataFile.at(file)
    data = change(status.read_bytes(0, status.num_bytes).decode()).encode()
    fresh = {path: path.with_name(path.name + ".new") for path in (file, manifest_file)}
    try:
        written = write_file(fresh[file], [data], len(data))
        manifest["files"][name] = {"bytes": written.num_bytes, "sha256": written.sha256}
        text = (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode()
        write_file(fresh[manifest_file], [text], len(text))
        for path, new in fresh.items():
            os.replace(new, path)
    finally:
        for new in fresh.values():
            new.unlink(missing_ok=True)
    sync_folder(out)


def require_space(out: Path, num_bytes: int) -> None:
    """Refuse to begin what cannot end.

    Raises:
        WriteError: if the disk has less than the bytes and a tenth.
    """
    place = _absolute(out).parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < num_bytes * _SLACK:
        raise WriteError(
            f"{out} needs about {num_bytes * _SLACK / 1e9:.2f} GB, but {place} has only {free / 1e9:.2f} GB free; free "
            "some space, or write to another disk",
        )


def _absolute(out: Path) -> Path:
    # Resolves links of the folders above, and a trailing "..", but not a link that `out` itself is.
    path = Path(os.path.abspath(out.expanduser()))
    return path.parent.resolve() / path.name


def _check_free(out: Path, source: Path | None) -> None:
    if not out.name:
        raise CheckpointError(f"{out} cannot be written; give the path of a new folder")
    if out.name.endswith(SUFFIX):
        raise CheckpointError(f"{out}: names that end in {SUFFIX} are for unfinished work; choose another")
    if source is not None:
        real = source.expanduser().resolve()
        if out.resolve() == real or real.is_relative_to(out):
            raise CheckpointError(f"OUT is the model itself ({out}); choose a new folder")
        if real.is_dir() and out.is_relative_to(real):
            raise CheckpointError(f"OUT ({out}) lies inside the model's folder {real}; choose a folder outside")
    if not os.path.lexists(out):
        return
    if out.is_dir() and not out.is_symlink() and not os.listdir(out):
        return
    raise CheckpointError(f"{out} exists already; nothing is ever written over: remove it, or choose another name")


def _is_ours(partial: Path) -> bool:
    """Whether the folder may be made, or was made by an export: its mark goes when the manifest is there."""
    if not os.path.lexists(partial):
        return True
    if partial.is_symlink() or not partial.is_dir():
        return False
    return not os.listdir(partial) or (partial / _MARK).is_file() or (partial / MANIFEST).is_file()


def _lock(partial: Path) -> int:
    """Held until the process ends, so that two runs never write to one folder."""
    descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise CheckpointError(f"{partial} is being written by another process; wait for it, or end it") from None
    return descriptor
