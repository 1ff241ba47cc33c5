"""A folder and its manifest: whatever a disk, a copy or a hand has changed is found, and the file is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from converters.errors import CheckpointError
from converters.export_folder import OutputFolder, replace_text
from converters.manifest import MANIFEST, Manifest
from converters.open import open_checkpoint

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As an export leaves it."""
    out = OutputFolder.create(tmp_path / "out")
    out.write_tensors(WEIGHTS, {"model.norm.weight": torch.arange(4096.0)}, {"format": "pt"})
    out.write_json("config.json", {"model_type": "llama"})
    out.write_text("README.md", "# A model\n")
    out.finish({"qengine": "0"})
    return tmp_path / "out"


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Manifest.read(folder).check()
    return str(caught.value)


def test_what_was_written_passes_and_every_byte_is_told(folder: Path) -> None:
    manifest, told = Manifest.read(folder), []
    manifest.check(told.append)
    files = [path for path in folder.iterdir() if path.name != MANIFEST]
    assert sum(told) == manifest.num_bytes == sum(path.stat().st_size for path in files)
    assert {file.path for file in manifest.files} == set(files)


@pytest.mark.parametrize("bit", [0, 3, 7])
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_one_bit_of_the_weights_is_found(folder: Path, place: float, bit: int) -> None:
    file = folder / WEIGHTS
    data = bytearray(file.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1 << bit
    file.write_bytes(data)
    message = refused(folder)
    assert str(file) in message
    assert "SHA-256" in message


def test_a_bit_of_the_data_is_found_by_nothing_else(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    open_checkpoint(folder)
    assert WEIGHTS in refused(folder)


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "README.md"])
def test_other_sizes_are_found_without_reading(folder: Path, name: str) -> None:
    with (folder / name).open("ab") as file:
        file.write(b"\0")
    message = refused(folder)
    assert name in message
    assert "bytes" in message


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_a_file_that_is_gone_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    message = refused(folder)
    assert name in message
    assert "missing" in message


@pytest.mark.parametrize("name", ["generation_config.json", "chat_template.jinja", "model-2.safetensors", "merges.txt"])
def test_a_file_that_loading_could_read_must_be_listed(folder: Path, name: str) -> None:
    (folder / name).write_text("{}")
    assert name in refused(folder)


def test_a_file_that_loading_does_not_read_may_be_added(folder: Path) -> None:
    (folder / "notes.md").write_text("good")
    Manifest.read(folder).check()


def test_a_card_that_was_changed_with_its_line_passes(folder: Path) -> None:
    replace_text(folder, "README.md", str.upper)
    Manifest.read(folder).check()


def test_a_folder_in_the_place_of_a_file(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()
    assert "regular file" in refused(folder)


@pytest.mark.parametrize("kind", ["folder", "file", "nothing"])
def test_without_a_manifest_it_is_said_who_writes_one(folder: Path, kind: str) -> None:
    if kind == "folder":
        (folder / MANIFEST).unlink()
    path = {"folder": folder, "file": folder / WEIGHTS, "nothing": folder / "nothing"}[kind]
    message = refused(path)
    assert "qengine convert" in message
    assert str(path) in message


SOUND = {"bytes": 10, "sha256": "0" * 64}
BAD: dict[str, Any] = {
    "a list": [],
    "no files": {"files": {}},
    "files in a list": {"files": [WEIGHTS]},
    "a file above": {"files": {"../x": SOUND}},
    "an absolute file": {"files": {"/etc/passwd": SOUND}},
    "a file below": {"files": {"a/b": SOUND}},
    "no name": {"files": {"": SOUND}},
    "the folder": {"files": {"..": SOUND}},
    "a name with a NUL": {"files": {"a\0b": SOUND}},
    "an entry that is a digest": {"files": {WEIGHTS: "0" * 64}},
    "no digest": {"files": {WEIGHTS: {"bytes": 10}}},
    "a short digest": {"files": {WEIGHTS: {**SOUND, "sha256": "0" * 63}}},
    "a digest of other letters": {"files": {WEIGHTS: {**SOUND, "sha256": "g" * 64}}},
    "no size": {"files": {WEIGHTS: {"sha256": "0" * 64}}},
    "a size below zero": {"files": {WEIGHTS: {**SOUND, "bytes": -1}}},
    "a size that is true": {"files": {WEIGHTS: {**SOUND, "bytes": True}}},
    "a size of 2**70": {"files": {WEIGHTS: {**SOUND, "bytes": 2**70}}},
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_bad_manifests(folder: Path, content: Any) -> None:
    (folder / MANIFEST).write_text(json.dumps(content))
    assert "out" in refused(folder)


@pytest.mark.parametrize("write", [lambda path: path.write_text("{"), lambda path: path.write_bytes(b"\xff")])
def test_manifests_that_are_no_json(folder: Path, write: Callable[[Path], object]) -> None:
    write(folder / MANIFEST)
    assert MANIFEST in refused(folder)
