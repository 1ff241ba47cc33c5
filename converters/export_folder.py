"""OutputFolder: a checkpoint that appears all at once, under its own name, or not at all.

Everything is written to ``OUT.partial`` and synced; ``manifest.json``, with the SHA-256 of every file, comes last; then
the folder is renamed to OUT. Invariant: at any moment, whatever ends the program, OUT either does not exist or is
complete, and nothing that existed before is touched. Loading refuses folders named ``.partial``. Below ``work`` lies
what a later run needs to go on. From the moment that the manifest is there the work is superfluous and the folder only
lacks its name: nothing here removes it any more, and `publish` can be tried as often as it takes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from converters.errors import CheckpointError, WriteError
from converters.files import DataFile, read_json_object
from converters.manifest import MANIFEST
from converters.safetensors_writer import Written, make_folder, replace_file, sync_folder, write_file, write_safetensors

PROJECT = "qengine"
SUFFIX = ".partial"
#: Below it, what a later run needs to go on.
WORK = "work"
#: Names a folder as ours, so that only such a one is ever removed; when it has gone, the manifest does.
_MARK = ".qengine-export"
_PART_BYTES = 16 * 2**20
_SLACK = 1.1
#: Where the system lists what is mounted; a folder mounted from the same disk looks like any other to stat.
_MOUNTS = Path("/proc/self/mountinfo")


class OutputFolder:
    """A folder that is being written. Use `create`, and `finish` or `discard`.

    Attributes:
        out: where it will be.
        partial: where it is until then.
        is_complete: whether only the name is missing; then `publish` is all that is left to do.
    """

    def __init__(self, out: Path, partial: Path, lock: int, *, is_complete: bool) -> None:
        self.out = out
        self.partial = partial
        self.is_complete = is_complete
        self._lock = lock
        self._files: dict[str, Written] = {}

    @classmethod
    def create(cls, out: Path, *, source: Path | None = None, resume: bool | None = False) -> OutputFolder:
        """Begin to write `out`.

        Args:
            source: the model that is read, which must not be written over.
            resume: True goes on with what an earlier run left, if it left something; False refuses to touch it; None
                does too, and has no way to go on with it.

        Raises:
            CheckpointError: if `out` exists or is `source`, or an earlier run's work or its whole result is in the way.
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
            lock = _lock(partial)
            is_complete = _finished_files(partial) is not None
            if not is_complete:
                (partial / _MARK).touch()
        except OSError as error:
            raise WriteError(f"cannot write to {partial}: {error.strerror}; choose another place") from error
        folder = cls(out, partial, lock, is_complete=is_complete)
        if not folder.is_complete and not folder.work.is_dir():
            folder._empty()
        elif not resume:
            os.close(lock)
            raise CheckpointError(_in_the_way(folder, can_go_on=resume is not None))
        return folder

    @property
    def work(self) -> Path:
        """Where a run keeps what a later one needs to go on; the caller makes it."""
        return self.partial / WORK

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
        self.write_text(name, _json(value).decode())

    def copy(self, path: Path, name: str | None = None) -> None:
        """A file of another folder, under its own name or another, which may lie in a folder of its own ("a/b").

        Raises:
            WriteError: if it cannot be written.
            CheckpointError: if it cannot be read.
        """
        file = DataFile.at(path)
        parts = (
            file.read_bytes(start, min(_PART_BYTES, file.num_bytes - start))
            for start in range(0, file.num_bytes, _PART_BYTES)
        )
        target = self.partial / (name or path.name)
        make_folder(target.parent)
        self._files[name or path.name] = write_file(target, parts, file.num_bytes)

    def rename(self, old: str, new: str) -> None:
        """A file that was written, under another name. Raises WriteError."""
        try:
            os.rename(self.partial / old, self.partial / new)
        except OSError as error:
            raise WriteError(f"cannot rename {self.partial / old}: {error.strerror}") from error
        self._files[new] = self._files.pop(old)

    # The end

    def finish(self, about: Mapping[str, Any]) -> None:
        """Write the manifest, which makes the folder complete, and give it its name.

        Args:
            about: entries of the manifest beside the files.

        Raises:
            WriteError: if it cannot be done.
        """
        for name in _names(self.partial) - self._files.keys():
            self._remove(self.partial / name)
        for parent in {(self.partial / name).parent for name in self._files}:
            sync_folder(parent)
        files = {name: {"bytes": f.num_bytes, "sha256": f.sha256} for name, f in sorted(self._files.items())}
        replace_file(self.partial / MANIFEST, _json({**about, "files": files}))
        self.is_complete = True
        self.publish()

    def publish(self) -> None:
        """Give a complete folder its name.

        Raises:
            WriteError: if it cannot be done; the folder stays as it is, and may be tried again.
        """
        assert self.is_complete, "what is not complete never gets its name"
        self._remove(self.work)
        self._remove(self.partial / _MARK)
        sync_folder(self.partial)
        try:
            os.rename(self.partial, self.out)
        except OSError as error:
            raise WriteError(
                f"cannot rename {self.partial} to {self.out}: {error.strerror}; all is written and only the name is "
                "missing: move what is in the way, then rename the folder"
            ) from error
        sync_folder(self.out.parent)
        self.close()

    def discard(self) -> None:
        """Remove all that was written, unless it is complete."""
        if not self.is_complete:
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
    """Whatever ends the block but its own end removes what was written, unless it is complete."""
    try:
        yield folder
    except BaseException:
        folder.discard()
        raise


def replace_text(out: Path, name: str, change: Callable[[str], str]) -> None:
    """Change a text file of a finished checkpoint, and its line in the manifest.

    In between the manifest does not list the file, so that at any moment all that it does list is so.

    Raises:
        CheckpointError: if one of them is not there.
        WriteError: if they cannot be written; the file is then the old one or the new one, and whole.
    """
    manifest = read_json_object(out / MANIFEST)
    status = DataFile.at(out / name)
    data = change(status.read_bytes(0, status.num_bytes).decode()).encode()
    files = {key: line for key, line in manifest["files"].items() if key != name}
    replace_file(out / MANIFEST, _json({**manifest, "files": files}))
    written = replace_file(out / name, data)
    files[name] = {"bytes": written.num_bytes, "sha256": written.sha256}
    replace_file(out / MANIFEST, _json({**manifest, "files": dict(sorted(files.items()))}))


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
    if out.is_dir() and not out.is_symlink() and _is_mount_point(out):
        raise CheckpointError(
            f"{out} is a place where something is mounted, and the output appears by a rename, which cannot replace "
            f"that; give a folder in it, such as {out / 'model'}"
        )
    if out.is_dir() and not out.is_symlink() and not os.listdir(out):
        return
    raise CheckpointError(f"{out} exists already; nothing is ever written over: remove it, or choose another name")


def _is_mount_point(folder: Path, mounts: str | None = None) -> bool:
    """Whether another file system, or a folder of the same one, is mounted there, so that nothing can be renamed to it.

    Args:
        mounts: the system's list; None reads it.
    """
    if mounts is None:
        try:
            mounts = _MOUNTS.read_text()
        except OSError:
            return os.path.ismount(folder)
    escaped = re.sub(r"[ \t\n\\]", lambda found: f"\\{ord(found[0]):03o}", str(folder))
    return any(line.split(" ")[4] == escaped for line in mounts.splitlines())


def _is_ours(partial: Path) -> bool:
    """Whether the folder may be made, or was made by an export: its mark goes when the manifest is there."""
    if not os.path.lexists(partial):
        return True
    if partial.is_symlink() or not partial.is_dir():
        return False
    return not os.listdir(partial) or (partial / _MARK).is_file() or _finished_files(partial) is not None


def _finished_files(partial: Path) -> Mapping[str, Any] | None:
    """What a manifest of ours lists, if just that is there and whole; None if not."""
    try:
        manifest = read_json_object(partial / MANIFEST)
        files = manifest["files"]
        if not str(manifest["producer"]).startswith(f"{PROJECT}:") or files.keys() != _names(partial):
            return None
        # Every file was synced before the manifest was written, so its size says enough.
        return files if all((partial / name).stat().st_size == line["bytes"] for name, line in files.items()) else None
    except (CheckpointError, OSError, KeyError, TypeError, AttributeError):
        return None


def _names(partial: Path) -> set[str]:
    """What lies in the folder but is not this module's own: files, also of folders below, by their relative name."""
    own = {_MARK, MANIFEST, f"{MANIFEST}.new", WORK}
    paths = [path for path in partial.rglob("*") if path.relative_to(partial).parts[0] not in own]
    return {str(path.relative_to(partial)) for path in paths if path.is_symlink() or not path.is_dir()}


def _in_the_way(folder: OutputFolder, *, can_go_on: bool) -> str:
    if folder.is_complete:
        way = "--resume gives it that name" if can_go_on else f"rename it to {folder.out.name}"
        return f"{folder.partial} is a complete checkpoint that only lacks its name: {way}; or remove that folder"
    way = "--resume" if can_go_on else "qengine quantize --resume"
    return (
        f"{folder.partial} holds the work of an earlier run that did not end: {way} goes on with it; to begin anew, "
        "remove that folder"
    )


def _json(value: Any) -> bytes:
    try:
        return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # Half of a pair, which JSON can hold and UTF-8 cannot.
        return (json.dumps(value, indent=2) + "\n").encode()


def _lock(partial: Path) -> int:
    """Held until the process ends, so that two runs never write to one folder."""
    descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise CheckpointError(f"{partial} is being written by another process; wait for it, or end it") from None
    return descriptor
