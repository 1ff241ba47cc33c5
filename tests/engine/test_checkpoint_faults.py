"""Model folders that are damaged, mismatched, changing or out of reach, opened as an engine opens them.

What `tests/converters` cannot see: the tokenizer beside the weights, the length that is planned, the manifest that
`--verify` asks for, and that every failure is the one error of the engine.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from converters.convert import convert
from converters.errors import CheckpointError
from converters.files import DataFile
from qengine import LLM, cli
from qengine.config import EngineConfig, LoadConfig
from qengine.errors import ConfigError, LoadError
from qengine.runtime.loader import open_model
from qengine.startup import model_tokenizer
from tests.engine.fixtures import path

FIXTURE = Path(path("llama-gptq-sym-g128"))
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURE, tmp_path / "model"))


def start(folder: Path, **options: Any) -> LLM:
    return LLM(str(folder), device="cpu", kv_cache_memory_bytes="4MiB", max_num_seqs=2, **options)


def with_tokenizer(folder: Path) -> None:
    config = EngineConfig.from_options({"model": str(folder), "device": "cpu"})
    model_tokenizer(config, open_model(config.load))


# Lengths


def test_a_context_of_a_billion_is_lowered_to_what_fits(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 10**9}))
    caplog.set_level(logging.WARNING, "qengine")
    with start(folder) as llm:
        info = llm.engine.info
        assert info.kv_cache_bytes <= 4 * 2**20
        assert info.max_model_len <= info.num_blocks * info.block_size
    assert "max_model_len lowered" in caplog.text
    assert str(info.max_model_len) in caplog.text
    with pytest.raises(ConfigError, match="max_model_len is 1000000000"):
        start(folder, max_model_len=10**9)


# The tokenizer


def test_more_tokens_than_the_embedding_has_rows(folder: Path) -> None:
    with_tokenizer(folder)
    file = str(folder / "tokenizer.json")
    backend = tokenizers.Tokenizer.from_file(file)
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    backend.add_tokens([f"<more {n}>" for n in range(rows - backend.get_vocab_size() + 1)])
    backend.save(file)
    with pytest.raises(LoadError, match=rf"tokenizer has {rows + 1} tokens.*only {rows}.*--tokenizer"):
        with_tokenizer(folder)


def test_a_token_id_far_beyond_the_embedding(folder: Path) -> None:
    """One id suffices: the number of tokens is not the largest id."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[next(reversed(vocabulary))] = 10**6
    file.write_text(json.dumps(content))
    with pytest.raises(LoadError, match="token"):
        with_tokenizer(folder)


def test_without_tokenizer_files(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(LoadError, match="has no tokenizer"):
        with_tokenizer(folder)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b'{"model": {"type": "Evil"}}', b"\xff\xfe", b'{"version": "1.0"']
)
def test_a_tokenizer_that_is_corrupt(folder: Path, content: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(LoadError, match=r"tokenizer"):
        with_tokenizer(folder)


# The manifest


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    convert(FIXTURE, out, "gptq")
    return out


def flip_a_bit(file: Path) -> None:
    """The last of the file: in the data, which no header speaks of."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_an_export_is_verified(exported: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "qengine")
    with start(exported, verify=True) as llm:
        assert llm.generate("Hi")[0].outputs
    assert "what manifest.json says" in caplog.text


def test_a_flipped_bit_is_found_if_that_is_asked_for(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "flipped"))
    (weights,) = folder.glob("*.safetensors")
    flip_a_bit(weights)
    with pytest.raises(LoadError, match=rf"{weights.name} is not the file that was written.*SHA-256"):
        start(folder, verify=True)
    with start(folder):
        pass
    assert cli.main(["serve", str(folder), "--port", "0", "--device", "cpu", "--verify"]) == 2
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert weights.name in message


def test_a_changed_tokenizer_is_found(exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "changed"))
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace("a", "b", 1))
    with pytest.raises(LoadError, match=r"tokenizer\.json is not the file"):
        start(folder, verify=True)


def test_verifying_needs_a_manifest(folder: Path) -> None:
    with pytest.raises(LoadError, match=r"no manifest\.json"):
        start(folder, verify=True)
    with pytest.raises(LoadError, match=r"no manifest\.json"):
        LLM(device="cpu", verify=True)
    with pytest.raises(ConfigError, match="verify"):
        LoadConfig(model=str(folder), verify=True, load_format="dummy")


# Files that change, or are out of reach


def replaced(file: Path) -> None:
    """Another file under the same name, as a download that ends puts it there."""
    other = file.with_name("other")
    other.write_bytes(file.read_bytes() + b"\0")
    other.rename(file)


@pytest.mark.parametrize(
    "change",
    [replaced, lambda file: os.truncate(file, file.stat().st_size // 2), lambda file: file.unlink()],
    ids=["replaced", "cut short", "removed"],
)
def test_weights_that_change_between_header_and_data(folder: Path, change: Callable[[Path], None]) -> None:
    opened = open_model(LoadConfig(model=str(folder)))
    change(folder / WEIGHTS)
    file = next(iter(opened.source._checkpoint.tensors.values())).file  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match=WEIGHTS):
        file.read(0, 16)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No signal ends the process, as it would if the file were mapped."""
    monkeypatch.setattr("converters.files._PART_BYTES", 2**12)
    path = tmp_path / "data"
    path.write_bytes(bytes(2**16))
    with DataFile.at(path).open() as file:
        data = file.read(0, 2**16)
        with pytest.raises(CheckpointError, match="ended 61440 bytes too early"):
            file.read_into(data, 0, lambda _: os.truncate(path, 2**12))


@contextmanager
def nobody() -> Iterator[None]:
    """As a user who may read nothing of ours; an ordinary user is one without its permissions already."""
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if was == 0:
            os.seteuid(0)


@pytest.mark.parametrize("name", ["", "config.json", WEIGHTS])
def test_what_may_not_be_read(name: str) -> None:
    root = Path(tempfile.mkdtemp())
    try:
        root.chmod(0o755)
        folder = Path(shutil.copytree(FIXTURE, root / "model"))
        (folder / name).chmod(0)
        with nobody(), pytest.raises(LoadError, match=rf"model.*{name}.*Permission denied"):
            open_model(LoadConfig(model=str(folder)))
    finally:
        (root / "model" / name).chmod(0o755)
        shutil.rmtree(root)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
@pytest.mark.parametrize("target", ["itself", "nothing", "a name too long", "the folder", "a file outside"])
def test_links_that_lead_nowhere_good(folder: Path, name: str, target: str) -> None:
    (folder / name).rename(folder.parent / name)
    targets = {"itself": name, "nothing": "gone", "a name too long": "x" * 300, "the folder": "."}
    (folder / name).symlink_to(targets.get(target, folder.parent / name))
    if (name, target) == ("config.json", "a file outside"):
        open_model(LoadConfig(model=str(folder)))
        return
    with pytest.raises(LoadError, match=name):
        open_model(LoadConfig(model=str(folder)))


def test_a_disk_that_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(LoadError, match=r"config\.json: Input/output error"):
        open_model(LoadConfig(model=str(folder)))
