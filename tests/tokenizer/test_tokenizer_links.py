"""Links among a tokenizer's files: they are followed within the folder and into the hub's cache, and nowhere else.

A template that is a link to the user's secrets could be read by every client.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qengine.errors import LoadError
from qengine.tokenizer import load_tokenizer
from qengine.tokenizer.files import read_bytes
from tests.tokenizer.conftest import FIXTURES

TEMPLATES = "additional_chat_templates"
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def write_folder(folder: Path) -> Path:
    """A tokenizer with every kind of file."""
    folder.mkdir(parents=True)
    shutil.copy(FIXTURES / "llama-gptq-sym-g128" / "tokenizer.json", folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (folder / "special_tokens_map.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("plain")
    (folder / TEMPLATES).mkdir()
    (folder / TEMPLATES / "tool_use.jinja").write_text("tools")
    return folder


def require_sound(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.eos_token_ids == {2}
    messages = [{"role": "user", "content": "x"}]
    assert tokenizer.render_chat(messages) == "plain"
    assert tokenizer.render_chat(messages, tools=[{"type": "function"}]) == "tools"


@pytest.mark.parametrize("name", [*FILES, f"{TEMPLATES}/tool_use.jinja", TEMPLATES])
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path / "model")
    outside = (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(outside)
    with pytest.raises(LoadError, match=rf"{name} is a link to a file outside the model.s folder, .*; put the file"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json", "merges.txt", "config.json", "added_tokens.json"])
def test_nor_is_one_followed_to_be_converted(tmp_path: Path, name: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tekken.json").write_text("{}")
    (tmp_path / "outside").write_text("{}")
    (tmp_path / "model" / name).symlink_to(tmp_path / "outside")
    with pytest.raises(LoadError, match=rf"{name} is a link to a file outside"):
        load_tokenizer(str(tmp_path / "model"))


def test_links_within_the_folder_are_followed(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    for name in (*FILES, f"{TEMPLATES}/tool_use.jinja"):
        own = (folder / name).with_suffix(".own")
        (folder / name).rename(own)
        (folder / name).symlink_to(own.name)
    require_sound(folder)
    (folder / TEMPLATES).rename(folder / "templates")
    (folder / TEMPLATES).symlink_to("templates")
    require_sound(folder)
    (tmp_path / "link").symlink_to(folder)
    require_sound(tmp_path / "link")


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    """huggingface_hub keeps the files under blobs/ and links to them from snapshots/<revision>/."""
    repository = tmp_path / "models--owner--name"
    snapshot = write_folder(repository / "snapshots" / "0123abcd")
    (repository / "blobs").mkdir()
    for number, name in enumerate((*FILES, f"{TEMPLATES}/tool_use.jinja")):
        (snapshot / name).rename(repository / "blobs" / str(number))
        (snapshot / name).symlink_to(Path("../" * (2 + name.count("/"))) / "blobs" / str(number))
    require_sound(snapshot)
    (repository / "other").mkdir()
    (repository / "blobs" / "4").rename(repository / "other" / "4")
    (snapshot / TEMPLATES / "tool_use.jinja").unlink()
    (snapshot / TEMPLATES / "tool_use.jinja").symlink_to("../../../other/4")
    with pytest.raises(LoadError, match="is a link to a file outside"):
        load_tokenizer(str(snapshot))


@pytest.mark.parametrize(("path", "message"), [("/proc/self/pagemap", "gives others"), ("/dev/zero", "not a regular")])
def test_what_is_no_link_must_still_be_a_sound_file(path: str, message: str) -> None:
    with pytest.raises(LoadError, match=message):
        read_bytes(Path(path), 100)
