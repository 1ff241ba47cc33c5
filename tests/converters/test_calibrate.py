"""Calibration texts: every source, every broken file, and samples that are cut, not packed, and always the same."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

from converters import calibration_hub
from converters.calibrate import (
    CalibrationTexts,
    Conversation,
    calibration_set,
    evenly,
    load_texts,
    make_samples,
)
from converters.calibration_builtin import HELD_OUT_TOPICS, builtin_texts
from converters.errors import CheckpointError


class ByteEncoder:
    """A token for each byte, 256 before a text; a template that marks turns with 257."""

    def __init__(self, chat_template: str | None = "by hand") -> None:
        self.chat_template = chat_template

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids = [257 if byte == 1 else byte for byte in text.encode()]
        return [256, *ids] if add_special_tokens else ids

    def render_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        assert not add_generation_prompt, "the last message is the model's own"
        return "".join(f"\1{message['role']}:{message['content']}" for message in messages)


def _write(folder: Path, name: str, *rows: object) -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# Sources


def test_the_builtin_set_is_enough_for_the_default() -> None:
    texts = load_texts("builtin")
    assert len(texts.rows) >= 128
    conversations = [row for row in texts.rows if isinstance(row, Conversation)]
    assert len(conversations) >= 10
    assert all(row.messages[-1]["role"] == "assistant" for row in conversations)
    plain = [row for row in texts.rows if isinstance(row, str)]
    assert min(map(len, plain)) > 100
    assert len(set(plain)) == len(plain)
    assert load_texts("builtin") == texts


def test_the_builtin_set_speaks_several_languages_and_leaves_some_topics_for_measuring() -> None:
    texts = "\n\n".join(row for row in builtin_texts() if isinstance(row, str))
    for word in ("zwölf", "今天", "Поезд", "#include <stdio.h>", "SELECT", "def heappush("):
        assert word in texts, word
    assert "\n%%\n" not in texts
    for name in HELD_OUT_TOPICS:
        assert not any(part in texts for part in topics[name].split("\n\n") if len(part) > 100), name


def test_rows_of_text_and_conversations(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi", "name": "Ann"}, {"role": "assistant", "content": "Hello"}]
    source = _write(tmp_path, "rows.jsonl", {"text": "first"}, {"messages": messages, "id": 7}, {"text": " "})
    plain = tuple({"role": m["role"], "content": m["content"]} for m in messages)
    assert load_texts(source) == CalibrationTexts(source, ("first", Conversation(plain)))


def test_a_row_may_hold_unusual_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a\u2028b"}\r\n\n{"text": "c"}', encoding="utf-8-sig")
    assert load_texts(str(path)).rows == ("a\u2028b", "c")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no.txt", None, "cannot open .*no.txt: No such file"),
        ("no.jsonl", None, "cannot open"),
        ("empty.txt", b"", "is empty"),
        ("blank.jsonl", b" \n\n ", "is empty"),
        ("bom.txt", b"\xef\xbb\xbf", "is empty"),
        ("binary.txt", b"GGUF\x03\x00\x00\x00", "is a binary file .a zero byte at 5"),
        ("binary.jsonl", bytes(range(1, 256)), "not text in UTF-8 .byte 0x80 at 127"),
        ("latin.txt", "Stra\xdfe\nhier\n".encode("latin1"), "iconv"),
        ("one.txt", b"Only one line, without an end", "has one line"),
        ("one.jsonl", b'{"text": "one"}\n', "has one row"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": 1}\n', r'line 2 has the keys text, expected "text"'),
        ("rows.jsonl", b'{"text": "a"}\n\n["b"]\n', "line 3 has a list"),
        ("rows.jsonl", b'{"text": "a"}\n{"content": "b"}\n', "the keys content"),
        ("rows.jsonl", b'{"text": "a"}\n{"messages": []}\n', "the keys messages"),
        ("rows.jsonl", b'{"text": "a"}\n{"messages": [{"role": "user"}]}\n', "the keys messages"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("rows.jsonl", b'{"text": "a"}\n' + b"[" * 100_000 + b"\n", "line 2 is not JSON"),
        ("rows.jsonl", b'{"text": ""}\n{"text": ""}\n', "2 rows, and the text of each is empty"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n', "surrogate"),
        ("data.csv", b"a,b\n1,2\n", "expected 'builtin'"),
        ("data.parquet", b"PAR1", "expected 'builtin'"),
    ],
)
def test_a_broken_file_is_refused_with_the_reason(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_texts(str(path))


def test_a_folder_and_a_huge_file_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "folder.txt"
    folder.mkdir()
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_texts(str(folder))
    huge = tmp_path / "huge.jsonl"
    with huge.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match="1048576 MiB, at most 256 are read; take a part"):
        load_texts(str(huge))


# The hub


def test_a_dataset_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _write(tmp_path, "train.jsonl", {"text": "a"}, {"text": "b"})
    asked = []

    def download(repository: str, name: str, *, repo_type: str) -> str:
        asked.append((repository, name, repo_type))
        return source

    names = ["README.md", "test.jsonl", "train.jsonl", "notes.txt"]
    monkeypatch.setattr(calibration_hub.HfApi, "list_repo_files", lambda self, repository, repo_type: names)
    monkeypatch.setattr(calibration_hub, "hf_hub_download", download)
    assert load_texts("org/texts").rows == ("a", "b")
    assert load_texts("org/texts:data/test.jsonl").name == "org/texts:data/test.jsonl"
    assert asked == [("org/texts", "train.jsonl", "dataset"), ("org/texts", "data/test.jsonl", "dataset")]


def test_a_dataset_without_a_readable_file(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["README.md", "data/train-0.parquet"]
    monkeypatch.setattr(calibration_hub.HfApi, "list_repo_files", lambda self, repository, repo_type: names)
    with pytest.raises(CheckpointError, match=r"no .jsonl or .txt file .it has: .md, .parquet.*load_dataset"):
        load_texts("org/texts")


def test_no_network_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ConnectionError("[Errno -3] Temporary failure in name resolution\nmore")

    monkeypatch.setattr(calibration_hub.HfApi, "list_repo_files", fail)
    monkeypatch.setattr(calibration_hub, "hf_hub_download", fail)
    for source in ("org/texts", "org/texts:file.jsonl"):
        with pytest.raises(CheckpointError, match=r"neither a file .* name resolution. Check the name and the network"):
            load_texts(source)


# Samples


def test_texts_are_cut_and_not_packed() -> None:
    texts = CalibrationTexts("test", ("abcdef", "g"))
    samples = make_samples(texts, ByteEncoder(), seq_len=4).samples
    assert [sample.tolist() for sample in samples] == [[256, *b"abc"], [256, *b"g"]]


def test_conversations_go_through_the_template_or_become_plain_turns() -> None:
    messages = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"})
    texts = CalibrationTexts("test", (Conversation(messages),))
    (templated,) = make_samples(texts, ByteEncoder()).samples
    assert templated.tolist() == [257, *b"user:Hi", 257, *b"assistant:Yo"]
    (plain,) = make_samples(texts, ByteEncoder(chat_template=None)).samples
    assert bytes(plain.tolist()[1:]) == b"User: Hi\n\nAssistant: Yo"


def test_a_running_text_gives_consecutive_pieces(tmp_path: Path) -> None:
    text = "".join(f"Line {index} of a running text.\n" for index in range(500))
    path = tmp_path / "text.txt"
    path.write_text(text)
    found = calibration_set(str(path), ByteEncoder(), num_samples=1000, seq_len=200)
    assert 60 <= len(found.samples) <= len(text) / 150
    assert all(len(sample) == 200 for sample in found.samples[:-1])
    positions = [text.index(bytes(sample.tolist()[1:]).decode()) for sample in found.samples]
    assert positions == sorted(positions)


def test_a_running_text_without_short_lines_is_split_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("x" * 5000 + "\n" + "y" * 5000)
    assert len(calibration_set(str(path), ByteEncoder(), seq_len=100).samples) >= 50


def test_samples_are_taken_from_the_whole_source() -> None:
    assert list(evenly(range(10), 4)) == [0, 2, 5, 7]
    assert list(evenly(range(3), 4)) == [0, 1, 2]
    assert list(evenly(range(3), 3)) == [0, 1, 2]


def test_the_same_source_gives_the_same_samples() -> None:
    first, second = (calibration_set("builtin", ByteEncoder(), num_samples=20, seq_len=50) for _ in range(2))
    assert first.sha256 == second.sha256
    assert len(first.samples) == 20
    assert first.num_tokens == sum(map(len, first.samples))
    assert first.sha256 != calibration_set("builtin", ByteEncoder(), num_samples=20, seq_len=51).sha256


def test_few_samples_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "converters")
    texts = CalibrationTexts("test", tuple(map(str, range(64))))
    make_samples(texts, ByteEncoder(), num_samples=64)
    assert not caplog.records
    make_samples(texts, ByteEncoder(), num_samples=63)
    make_samples(CalibrationTexts("test", texts.rows[:63]), ByteEncoder())
    assert [record.getMessage()[:51] for record in caplog.records] == [
        "calibration with 63 samples (63 were asked for): fe",
        "calibration with 63 samples (the source has 63): fe",
    ]


@pytest.mark.parametrize("sizes", [{"num_samples": 0}, {"seq_len": 0}, {"num_samples": -1}])
def test_sizes_below_one_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(CheckpointError, match="expected at least 1"):
        make_samples(CalibrationTexts("test", ("a",)), ByteEncoder(), **sizes)


def test_texts_without_a_token_are_refused() -> None:
    class Nothing(ByteEncoder):
        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            return []

    with pytest.raises(CheckpointError, match="no token"):
        make_samples(CalibrationTexts("test", ("a",)), Nothing())
