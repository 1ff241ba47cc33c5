"""What is copied beside the weights: the folder's own files, and nothing that a link names elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from converters.convert import convert
from converters.errors import CheckpointError
from converters.export_files import find_companions, write_companions
from converters.export_folder import OutputFolder
from tests.converters.tiny_models import tiny_folder

TEMPLATES = "additional_chat_templates"
NAMES = ["LICENSE", "chat_template.jinja", "tokenizer.json", f"{TEMPLATES}/rag.jinja"]


def write_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / TEMPLATES).mkdir()
    for name in NAMES:
        (folder / name).write_text(name)
    (folder / "modeling_own.py").write_text("raise SystemExit")
    return folder


def require_copied(folder: Path, out: Path) -> None:
    written = OutputFolder.create(out)
    try:
        write_companions(written, object(), folder)
        assert {name: (written.partial / name).read_text() for name in NAMES} == {name: name for name in NAMES}
        assert not (written.partial / "modeling_own.py").exists()
        assert not (written.partial / "NOTICE").exists()
    finally:
        written.discard()


@pytest.mark.parametrize("name", [*NAMES, TEMPLATES])
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path / "model")
    outside = (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(outside)
    with pytest.raises(CheckpointError, match=rf"{name}.* is a link to a file outside the folder, .*; put the file"):
        find_companions(folder)


def test_nothing_is_exported_of_a_folder_with_such_a_link(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model")
    (tmp_path / "id_rsa").write_text("secret")
    (model / "LICENSE").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(CheckpointError, match="LICENSE is a link"):
        convert(str(model), str(tmp_path / "out"), "dense")
    assert not (tmp_path / "out").exists()


def test_links_within_the_folder_are_followed(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    for name in NAMES:
        own = (folder / name).with_suffix(".own")
        (folder / name).rename(own)
        (folder / name).symlink_to(own.name)
    (folder / "NOTICE").symlink_to("gone")
    require_copied(folder, tmp_path / "out")


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    """huggingface_hub keeps the files under blobs/ and links to them from snapshots/<revision>/."""
    repository = tmp_path / "models--owner--name"
    snapshot = write_folder(repository / "snapshots" / "0123abcd")
    (repository / "blobs").mkdir()
    for number, name in enumerate(NAMES):
        (snapshot / name).rename(repository / "blobs" / str(number))
        (snapshot / name).symlink_to(Path("../" * (2 + name.count("/"))) / "blobs" / str(number))
    require_copied(snapshot, tmp_path / "out")
