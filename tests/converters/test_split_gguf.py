"""GGUF files in several parts: with a part missing, swapped, cut short, counted wrongly or taken from another model."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from converters.errors import CheckpointError
from converters.gguf_file import open_gguf
from tests.converters.gguf_files import write_gguf

F32 = GGMLQuantizationType.F32


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """A model in three parts of one tensor each."""
    tensors = {f"blk.{index}.attn_norm.weight": (np.ones(32, np.float32), F32) for index in range(3)}
    write_gguf(tmp_path / "m.gguf", tensors, heads=2, kv_heads=1, hidden=32, split_every=1)
    found = sorted(tmp_path.glob("*.gguf"))
    assert [path.name for path in found] == [f"m-{number:05d}-of-00003.gguf" for number in (1, 2, 3)]
    return found


def test_all_parts_are_one_model(parts: list[Path]) -> None:
    assert len(open_gguf(parts[0]).tensors) == 3


@pytest.mark.parametrize("missing", [1, 2])
def test_a_missing_part_is_named(parts: list[Path], missing: int) -> None:
    parts[missing].unlink()
    with pytest.raises(CheckpointError, match=f"m-{missing + 1:05d}-of-00003\\.gguf: missing"):
        open_gguf(parts[0])


def test_a_missing_first_part_is_named(parts: list[Path]) -> None:
    parts[0].unlink()
    with pytest.raises(CheckpointError, match=r"m-00001-of-00003\.gguf: missing"):
        open_gguf(parts[1])


def test_parts_that_changed_places_are_refused(parts: list[Path]) -> None:
    shutil.copy(parts[1], parts[2])
    with pytest.raises(CheckpointError, match="part 3 of 3"):
        open_gguf(parts[0])


def test_a_part_cut_short_is_refused(parts: list[Path]) -> None:
    parts[2].write_bytes(parts[2].read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"m-00003-of-00003\.gguf: tensor .* ends at byte"):
        open_gguf(parts[0])


def test_a_part_under_another_name_is_refused(parts: list[Path]) -> None:
    other = parts[0].rename(parts[0].with_name("model.gguf"))
    with pytest.raises(CheckpointError, match="one of 3 parts, expected a name"):
        open_gguf(other)


def test_a_count_that_the_name_does_not_have_is_refused(parts: list[Path]) -> None:
    other = parts[0].rename(parts[0].with_name("m-00001-of-00002.gguf"))
    with pytest.raises(CheckpointError, match="one of 3 parts, expected a name"):
        open_gguf(other)


def test_a_folder_in_the_place_of_a_part_is_refused(parts: list[Path]) -> None:
    parts[1].unlink()
    parts[1].mkdir()
    with pytest.raises(CheckpointError, match=r"m-00002-of-00003\.gguf: missing"):
        open_gguf(parts[0])


def test_a_part_that_is_a_link_out_of_the_folder(parts: list[Path]) -> None:
    outside = parts[0].parent.parent / "outside.gguf"
    parts[1].rename(outside)
    parts[1].symlink_to(outside)
    with pytest.raises(CheckpointError, match=r"m-00002-of-00003\.gguf: a link to a file that does not lie beside"):
        open_gguf(parts[0])


def test_parts_that_are_all_links_into_one_folder(parts: list[Path], tmp_path: Path) -> None:
    """As people keep large files on another disk."""
    links = tmp_path / "links"
    links.mkdir()
    for part in parts:
        (links / part.name).symlink_to(part)
    assert len(open_gguf(links / parts[0].name).tensors) == 3
