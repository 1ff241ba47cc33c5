"""manifest.json: the size and SHA-256 of every file of an exported checkpoint, and the comparison of a folder with it.

It finds what a disk, a copy or a download has changed, a flipped bit included. It proves nothing about who wrote the
folder: whoever can change a file can change the manifest too. Invariant: a folder that passes has exactly the files
that were written, as far as loading reads them, with exactly their bytes. Reads every byte once, through DataFile.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError
from converters.files import DataFile, list_folder, read_json_object, shown

MANIFEST = "manifest.json"
_PART_BYTES = 16 * 2**20
#: What loading may read. Other files, such as a card of the model, may come and go.
_READ_BY_LOADING = (".safetensors", ".json", ".jinja", ".model", ".gguf", "merges.txt")
_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True, slots=True)
class Listed:
    """What the manifest says of one file."""

    path: Path
    num_bytes: int
    sha256: str

    def check(self, after_part: Callable[[int], None] | None = None) -> None:
        """Read the file and compare.

        Args:
            after_part: told the bytes of every part that was read; what it raises ends the reading.

        Raises:
            CheckpointError: naming the file, if it is not what the manifest says.
        """
        file = DataFile.at(self.path)
        if file.num_bytes != self.num_bytes:
            raise self._differs(f"it has {file.num_bytes} bytes", f"{self.num_bytes}")
        digest = hashlib.sha256()
        with file.open() as opened:
            for start in range(0, file.num_bytes, _PART_BYTES):
                part = opened.read(start, min(_PART_BYTES, file.num_bytes - start))
                digest.update(part.data)
                if after_part is not None:
                    after_part(len(part))
        if digest.hexdigest() != self.sha256:
            raise self._differs(f"its SHA-256 is {digest.hexdigest()}", self.sha256)

    def _differs(self, found: str, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{shown(self.path)} is not the file that was written: {found}, {MANIFEST} says {expected}; copy or "
            "download the checkpoint again"
        )


@dataclass(frozen=True, slots=True)
class Manifest:
    """The files of a folder."""

    folder: Path
    files: tuple[Listed, ...]

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder.

        Raises:
            CheckpointError: if it has none, or one that cannot be read.
        """
        path = folder / MANIFEST
        if not folder.is_dir() or MANIFEST not in list_folder(folder):
            raise CheckpointError(
                f"{folder} cannot be verified: it has no {MANIFEST}, which only folders have that `qengine convert` "
                "and `qengine quantize` wrote; load it without --verify"
            )
        files = read_json_object(path, unique_keys=True).get("files")
        if not isinstance(files, dict) or not files:
            raise CheckpointError(f"{path}: files must map names to sizes and digests")
        return cls(folder, tuple(_listed(path, name, entry) for name, entry in files.items()))

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(file.num_bytes for file in self.files)

    def check(self, after_part: Callable[[int], None] | None = None) -> None:
        """Compare the folder with the manifest: first what is there, then all bytes.

        Args:
            after_part: told the bytes of every part that was read; what it raises ends the reading.

        Raises:
            CheckpointError: naming the first file that is missing, added or different.
        """
        names = list_folder(self.folder)
        for file in self.files:
            if file.path.name not in names:
                raise CheckpointError(f"{file.path} is missing, {MANIFEST} lists it; copy the checkpoint again")
        listed = {MANIFEST, *(file.path.name for file in self.files)}
        for name in names:
            if name not in listed and name.endswith(_READ_BY_LOADING):
                raise CheckpointError(
                    f"{shown(self.folder / name)} was added: {MANIFEST} does not list it, and loading could read it; "
                    "move it away"
                )
        for file in self.files:
            file.check(after_part)


def _listed(path: Path, name: str, entry: Any) -> Listed:
    where = f"{path}: '{shown(name)}'"
    if name in ("", ".", "..") or "\0" in name or Path(name).name != name:
        raise CheckpointError(f"{where} is listed, expected plain names of files in the same folder")
    num_bytes, sha256 = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, Mapping) else (None, None)
    if not isinstance(num_bytes, int) or isinstance(num_bytes, bool) or num_bytes < 0:
        raise CheckpointError(f"{where} has {shown(num_bytes)} bytes, expected a whole number")
    if not isinstance(sha256, str) or len(sha256) != 64 or not _HEX.issuperset(sha256):
        raise CheckpointError(f"{where} has the sha256 {shown(sha256)}, expected 64 hexadecimal digits")
    return Listed(path.with_name(name), num_bytes, sha256)
