"""How far a tokenizer may stretch a text: what published ones do passes, and each bound is met."""

from __future__ import annotations

import base64
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers

from converters.encoder import HubEncoder
from converters.errors import CheckpointError
from converters.open import open_checkpoint
from qengine.commands.quantize import _open_tokenizer
from qengine.errors import LoadError, RequestError
from qengine.tokenizer import Tokenizer, load_tokenizer
from qengine.tokenizer.files import is_there, read_bytes, read_json
from qengine.tokenizer.limits import MAX_NORMALIZED_BYTES, require_small_stretch
from qengine.tokenizer.rust_errors import MAX_REASON_LEN, shorten
from qengine.tokenizer.tokenizer_json import check_tokenizer_json
from tests.engine.fixtures import path as fixture

FOLDER = Path(fixture("llama-gptq-sym-g128"))
SPACE = "\u2581"


def _charsmap(*texts: str) -> str:
    trie = bytes(8)
    data = len(trie).to_bytes(4, "little") + trie + b"".join(text.encode() + b"\0" for text in texts)
    return base64.b64encode(data).decode()


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


LLAMA = [{"type": "Prepend", "prepend": SPACE}, _replace({"String": " "}, SPACE)]
#: The longest text in SentencePiece's own map has 33 bytes.
MAP = {"type": "Precompiled", "precompiled_charsmap": _charsmap("a", "x" * 33, "bc")}


@pytest.mark.parametrize(
    ("normalizer", "stretch"),
    [
        (None, 1),
        ({"type": "NFC"}, 11),
        (_replace({"String": " "}, SPACE), 3),
        ({"type": "Sequence", "normalizers": LLAMA}, 12),
        ({"type": "Sequence", "normalizers": [MAP, _replace({"Regex": " {2,}"}, " ")]}, 33),
        ({"type": "Sequence", "normalizers": [MAP, _replace({"Regex": " {2,}"}, SPACE)]}, 49.5),
        ({"type": "Sequence", "normalizers": [{"type": "Lowercase"}, {"type": "Strip"}]}, 2),
    ],
)
def test_normalizers_of_published_tokenizers_pass(normalizer: Any, stretch: float) -> None:
    assert require_small_stretch(normalizer, "it") == stretch


@pytest.mark.parametrize(
    "normalizer",
    [
        _replace({"String": "a"}, "b" * 65),
        _replace({"String": ""}, "b" * 65),
        _replace({"Regex": "a*"}, "b" * 64),
        _replace({"Regex": "a{0,}"}, "b" * 64),
        {"type": "Prepend", "prepend": "b" * 64},
        {"type": "Precompiled", "precompiled_charsmap": _charsmap("a", "b" * 65)},
        {"type": "Precompiled", "precompiled_charsmap": _charsmap("a", "b" * 80)[:-4]},
        {"type": "Sequence", "normalizers": [{"type": "NFKD"}, {"type": "NFKD"}]},
        {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [LLAMA[0]] * 4}]},
    ],
)
def test_normalizers_that_make_much_are_refused(normalizer: Any) -> None:
    with pytest.raises(LoadError, match="grows a text up to"):
        require_small_stretch(normalizer, "it")


@pytest.mark.parametrize(
    "normalizer", [{"type": "Later"}, {"type": 5}, {}, [], "NFC", {"type": "Sequence", "normalizers": [5]}]
)
def test_normalizers_that_are_not_known_are_refused(normalizer: Any) -> None:
    with pytest.raises(LoadError, match="not known"):
        require_small_stretch(normalizer, "it")


def test_a_map_that_makes_much_is_what_the_library_makes_of_it() -> None:
    """The stretch of a map is met: a byte becomes the whole text."""
    real = normalizers.Precompiled(base64.b64decode(_one_letter_map("b" * 40)))
    assert real.normalize_str("aaaa") == "b" * 160
    state = {"type": "Precompiled", "precompiled_charsmap": _one_letter_map("b" * 40)}
    assert require_small_stretch(state, "it") == 40


def _one_letter_map(text: str) -> str:
    """A double-array trie that knows "a" alone, as a leaf that points at offset 0 of the texts."""
    units = [0] * 256
    offset = 1
    units[0] = offset << 10
    units[offset ^ ord("a")] = ord("a") | 1 << 8 | (offset ^ ord("a") ^ 2) << 10
    units[2] = 1 << 31
    trie = b"".join(unit.to_bytes(4, "little") for unit in units)
    return base64.b64encode(len(trie).to_bytes(4, "little") + trie + text.encode() + b"\0").decode()


def test_a_prompt_is_no_longer_than_can_be_normalized() -> None:
    backend = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    backend.decoder = decoders.ByteLevel()
    backend.normalizer = normalizers.Replace("a", "a" * 60)
    tokenizer = Tokenizer(backend)
    assert len(tokenizer.encode("a" * 100)) == 6000
    with pytest.raises(RequestError, match="60 times longer") as caught:
        tokenizer.encode("a" * (MAX_NORMALIZED_BYTES // 60 + 1))
    assert caught.value.param == "prompt"


def _json(**parts: Any) -> bytes:
    whole = json.loads((FOLDER / "tokenizer.json").read_text())
    return json.dumps({**whole, **parts}).encode()


def test_a_part_is_found_however_its_key_is_spelled() -> None:
    data = _json(normalizer=_replace({"String": "a"}, "b" * 100))
    for spelled in (rb'"\u006eormalizer"', rb'"\u006E\u006frmalizer"', b'"normalizer" \n\t'):
        with pytest.raises(LoadError, match="grows a text"):
            check_tokenizer_json(data.replace(b'"normalizer"', spelled), "it")
    with pytest.raises(LoadError, match="grows a text"):
        check_tokenizer_json(data[:-1] + b', "normalizer": null}', "it")
    with pytest.raises(LoadError, match="a key occurs twice"):
        check_tokenizer_json(data.replace(b'"type": "Replace"', b'"type": "NFC", "type": "Replace"'), "it")


def test_words_of_a_vocabulary_are_no_parts() -> None:
    vocab = {"normalizer": 0, "decoder": 1, "added_tokens": 2, 'say "decoder": x': 3, "pre_tokenizer": 4}
    data = _json(model={"type": "BPE", "vocab": vocab, "merges": []})
    check_tokenizer_json(data, "it")
    assert tokenizers.Tokenizer.from_buffer(data).get_vocab()["decoder"] == 1


def test_added_tokens_and_the_normalizer_are_bounded_together() -> None:
    token = {"id": 0, "single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    added = [{**token, "id": number, "content": f"{number:08}" * 1000} for number in range(300)]
    check_tokenizer_json(_json(added_tokens=added), "it")
    with pytest.raises(LoadError, match="of its added tokens"):
        check_tokenizer_json(_json(added_tokens=added, normalizer=_replace({"String": "a"}, "b" * 60)), "it")


# Files


def test_only_regular_files_of_their_size_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_bytes(tmp_path / "file", 5) == b"12345"
    assert not is_there(tmp_path / "missing")
    os.mkfifo(tmp_path / "pipe")
    for name, most, message in (
        ("file", 4, "at most 4"),
        ("pipe", 5, "not a regular file"),
        (".", 5, "cannot read|not a regular file"),
        ("x" * 300, 5, "cannot read"),
        ("missing", 5, "cannot read"),
    ):
        with pytest.raises(LoadError, match=message):
            read_bytes(tmp_path / name, most)
    with pytest.raises(LoadError, match="gives others"):
        read_bytes(Path("/proc/self/status"), 10_000)
    with pytest.raises(LoadError, match="cannot read"):
        is_there(tmp_path / ("x" * 300))


def test_a_configuration_has_few_values(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [' + "0," * 300_000 + "0]}")
    with pytest.raises(LoadError, match="values"):
        read_json(tmp_path / "a.json")


def test_a_conversion_reads_nothing_beside_the_folder(tmp_path: Path) -> None:
    """transformers would take the paths of files from tokenizer_config.json."""
    whole = json.loads((FOLDER / "tokenizer.json").read_text())["model"]
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder, vocab in ((inside, whole["vocab"]), (outside, {"evil": 0})):
        folder.mkdir()
        merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in whole["merges"]]
        (folder / "vocab.json").write_text(json.dumps(vocab))
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges] if folder == inside else []))
    (inside / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "vocab_file": str(outside / "vocab.json")})
    )
    tokenizer = load_tokenizer(str(inside))
    assert tokenizer.vocab_size >= len(whole["vocab"])
    assert tokenizer.encode("evil") != [0]


def test_a_reason_is_cut_before_it_is_taken_apart() -> None:
    assert len(shorten("a " * 10_000_000)) == MAX_REASON_LEN


# Calibration


def test_calibration_runs_no_template_without_bounds(tmp_path: Path) -> None:
    for file in FOLDER.iterdir():
        shutil.copy(file, tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.jinja").write_text(
        "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"
    )
    source = open_checkpoint(tmp_path)
    engines, plain = _open_tokenizer(source, tmp_path), HubEncoder.open(source, tmp_path)
    assert isinstance(engines, Tokenizer)
    assert plain.chat_template is None
    assert plain.encode("Hello") == engines.encode("Hello")
    with pytest.raises(CheckpointError, match="qengine quantize"):
        plain.render_chat([])


def test_calibration_reads_sound_files_alone(tmp_path: Path) -> None:
    for file in FOLDER.iterdir():
        shutil.copy(file, tmp_path)
    source = open_checkpoint(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError, match="not a regular file"):
        HubEncoder.open(source, tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match="at most"):
        HubEncoder.open(source, tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").write_text("[")
    with pytest.raises(CheckpointError, match="no tokenizer can be made"):
        HubEncoder.open(source, tmp_path)
