"""Files that say nothing false at first sight, and are made to cost as much memory and time as a small file can.

Each is refused, or read because a published model could have as much, in less than five seconds and within 100 MB of
what the process had. Vocabularies at the very limit may take twice that: the largest that are published take as much.
"""

from __future__ import annotations

import json
import subprocess
import sys
from array import array
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from converters.checkpoint import MAX_HEADER_BYTES
from converters.files import MAX_JSON_BYTES, MAX_JSON_MARKS
from converters.gguf_file import MAX_PAIRS, MAX_TENSORS
from converters.gguf_tokenizer import MAX_MERGES, MAX_TOKENS
from tests.converters.folders import write_folder
from tests.converters.gguf_files import (
    F32,
    STRING,
    U32,
    array_pair,
    pair,
    string_pair,
    tensor_info,
    text,
    u32_pair,
)
from tests.converters.test_bad_gguf import SOUND
from tests.converters.test_bad_safetensors import raw_file

ROOT = Path(__file__).parents[2]
MB = 2**20
FILE = "model.safetensors"

Maker = Callable[[Path], None]
#: The largest files are made when the tests run, not wherever they are collected.
LateMaker = Callable[[], Maker]


# JSON


def header(content: bytes) -> Maker:
    return lambda folder: (folder / FILE).write_bytes(raw_file(content)) and None


def many(opening: bytes, item: bytes, end: bytes, num_bytes: int, num_marks: int = 2**31) -> bytes:
    """JSON text of an item many times: as many as the text, or the count of brackets and commas, lets in."""
    marks = sum(item.count(mark) for mark in b"{[,")
    count = min((num_bytes - len(opening) - len(end)) // len(item), (num_marks - 10) // max(1, marks))
    return opening + (item * count)[:-1] + end


def keys(count: int, entry: str) -> bytes:
    """An object of distinct keys, each with this value."""
    return ("{" + ",".join(f'"{number:x}":{entry}' for number in range(count)) + "}").encode()


def file_of(name: str, content: bytes) -> Maker:
    return lambda folder: (folder / name).write_bytes(content) and None


NOTHING = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
#: What Python makes of a string grows fourfold with one character beyond the basic plane.
ASTRAL = b"\\ud83d\\ude00"


def four_shards(folder: Path) -> None:
    """Each is sound and as large as a file may be, but for the names."""
    (folder / FILE).unlink()
    places = {}
    for number in range(4):
        names = [f"{number}.{tensor}" for tensor in range(35_000)]
        content = "{" + ",".join(f'"{name}":{NOTHING}' for name in names) + "}"
        (folder / f"{number}.safetensors").write_bytes(raw_file(content.encode()))
        places[names[0]] = f"{number}.safetensors"
    (folder / f"{FILE}.index.json").write_text(json.dumps({"weight_map": places}))


def long_metadata(folder: Path) -> None:
    """Shards whose tensors are few and whose metadata are long."""
    (folder / FILE).unlink()
    places = {}
    for number in range(40):
        content = {"__metadata__": {str(number): "x" * 2**16}, f"t{number}": json.loads(NOTHING)}
        (folder / f"{number}.safetensors").write_bytes(raw_file(content))
        places[f"t{number}"] = f"{number}.safetensors"
    (folder / f"{FILE}.index.json").write_text(json.dumps({"weight_map": places}))


def one_long_metadata(folder: Path) -> None:
    """Many shards, of which one has as many metadata as all may have."""
    (folder / FILE).unlink()
    names = [f"{number:04d}.safetensors" for number in range(3000)]
    for number, name in enumerate(names):
        strings = {f"{key:x}": "" for key in range(0 if number else 150_000)}
        (folder / name).write_bytes(raw_file({"__metadata__": strings, f"t{number}": json.loads(NOTHING)}))
    places = {f"t{number}": name for number, name in enumerate(names)}
    (folder / f"{FILE}.index.json").write_text(json.dumps({"weight_map": places}))


def index(content: bytes) -> Maker:
    def make(folder: Path) -> None:
        (folder / FILE).unlink()
        (folder / f"{FILE}.index.json").write_bytes(content)

    return make


FOLDERS: Mapping[str, tuple[LateMaker, str]] = {
    "a header of empty objects": (
        lambda: header(many(b'{"a":[', b"{},", b"]}", MAX_HEADER_BYTES)),
        "brackets and commas",
    ),
    "a header of empty objects, as many as are read": (
        lambda: header(many(b'{"a":[', b"{},", b"]}", MAX_HEADER_BYTES, MAX_JSON_MARKS)),
        "needs dtype",
    ),
    "a header of numbers": (lambda: header(many(b'{"a":[', b"1e9,", b"]}", MAX_HEADER_BYTES)), "brackets and commas"),
    "a header of keys": (lambda: header(keys(MAX_JSON_MARKS - 2, "1")), "needs dtype"),
    "a header over the limit": (lambda: header(b'{"' + b"a" * MAX_HEADER_BYTES + b'":1}'), "at most"),
    "a header with a string as long as it": (
        lambda: header(b'{"__metadata__":{"a":"' + b"a" * (MAX_HEADER_BYTES - 60) + ASTRAL + b'"}}'),
        "__metadata__",
    ),
    "a header of 30,000 tensors": (lambda: header(keys(30_000, NOTHING)), "read"),
    "four files of 35,000 tensors": (lambda: four_shards, "tensors"),
    "40 files with long metadata": (lambda: long_metadata, "__metadata__"),
    "3,000 files after one with long metadata": (lambda: one_long_metadata, "read"),
    "an index of empty objects": (lambda: index(many(b'{"weight_map":[', b"{},", b"]}", MAX_HEADER_BYTES)), "brackets"),
    "an index of as many names as are read": (
        lambda: index(b'{"weight_map":' + keys(MAX_JSON_MARKS - 10, '"x.s"') + b"}"),
        "not there",
    ),
    "an index over the limit": (lambda: index(b'{"' + b"a" * MAX_HEADER_BYTES + b'":1}'), "at most"),
    **{
        f"{name} {what}": (partial(file_of, name, content), said)
        for name in ("config.json", "quantize_config.json")
        for what, content, said in (
            ("of empty lists", many(b'{"a":[', b"[],", b"]}", MAX_JSON_BYTES), "brackets"),
            ("of as many lists as are read", many(b'{"a":[', b"[],", b"]}", MAX_JSON_BYTES, MAX_JSON_MARKS), "read"),
            ("of keys", keys(MAX_JSON_MARKS - 2, "1"), "read"),
            ("with one long string", b'{"a":"' + b"a" * (MAX_JSON_BYTES - 30) + ASTRAL + b'"}', "read"),
            ("over the limit", b'{"a":"' + b"a" * MAX_JSON_BYTES + b'"}', "at most"),
        )
    },
}


# GGUF


def gguf(*pairs: bytes, **changes: Any) -> Maker:
    def make(folder: Path) -> None:
        (folder / "model.gguf").write_bytes(replace(SOUND.plus(*pairs), **changes).to_bytes())

    return make


def strings(*values: bytes) -> bytes:
    return array_pair("k", STRING, len(values), b"".join(map(text, values)))


def infos(count: int) -> list[bytes]:
    return [tensor_info(f"{number:x}", (1,), offset=32 * number) for number in range(count)]


def long_strings(first: int) -> list[bytes]:
    """A metadata head of 12 MiB."""
    return [pair(f"long.{first + number}", STRING, text(b"a" * MB)) for number in range(12)]


def three_parts(folder: Path) -> None:
    """Parts of a model, each with a head that a file alone may have."""
    for number in range(3):
        pairs = (u32_pair("split.no", number), u32_pair("split.count", 3), *long_strings(0))
        info = tensor_info(f"blk.{number}.attn_norm.weight")
        part = replace(SOUND.plus(*pairs), infos=(info,))
        (folder / f"m-{number + 1:05d}-of-00003.gguf").write_bytes(part.to_bytes())


def parts_of_many_tensors(folder: Path) -> None:
    for number in range(2):
        pairs = (u32_pair("split.no", number), u32_pair("split.count", 2))
        named = [tensor_info(f"{number}.{tensor}", (1,), offset=32 * tensor) for tensor in range(40_000)]
        part = replace(SOUND.plus(*pairs), infos=named, data=bytes(32 * 40_000))
        (folder / f"m-{number + 1:05d}-of-00002.gguf").write_bytes(part.to_bytes())


def rope_of_a_head_of(head_dim: int) -> Maker:
    """Rope factors for a head of that size, which the file has, without a byte of them on the disk."""

    def make(folder: Path) -> None:
        sizes = [u32_pair(f"llama.{key}", head_dim) for key in ("attention.key_length", "rope.dimension_count")]
        info = tensor_info("rope_freqs.weight", (head_dim // 2,), kind=1)
        content = replace(SOUND.plus(*sizes), infos=(info,), data=b"").to_bytes()
        with (folder / "model.gguf").open("wb") as file:
            file.write(content)
            file.truncate(len(content) + head_dim)

    return make


def vocabulary(
    tokens: list[str],
    types: list[int] | None = None,
    model: str = "llama",
    names: array[int] | None = None,
    **merges: list[str],
) -> Maker:
    """A file whose tokenizer has these tokens, and such names of chat templates."""
    pairs = [
        string_pair("tokenizer.ggml.model", model),
        array_pair("tokenizer.ggml.tokens", STRING, len(tokens), b"".join(map(text, tokens))),
        array_pair("tokenizer.ggml.token_type", 5, len(tokens), array("i", types or [1] * len(tokens)).tobytes()),
        array_pair("tokenizer.ggml.scores", F32, len(tokens), bytes(4 * len(tokens))),
        *([array_pair("tokenizer.chat_templates", U32, len(names), names.tobytes())] if names else []),
        *(array_pair(f"tokenizer.ggml.{k}", STRING, len(v), b"".join(map(text, v))) for k, v in merges.items()),
    ]
    return gguf(*pairs)


def own(chars: str, count: int) -> list[str]:
    """Distinct tokens with the same text behind."""
    return [f"{number:05x}{chars}" for number in range(count)]


SHORT_ASTRAL = "\N{GRINNING FACE}".encode() + b"aaaaaaaa"
GGUFS: Mapping[str, tuple[LateMaker, str]] = {
    "more tensors than are read": (lambda: gguf(infos=infos(MAX_TENSORS + 1)), "at most"),
    "as many tensors as are read": (lambda: gguf(infos=infos(MAX_TENSORS), data=bytes(32 * MAX_TENSORS)), "read"),
    "tensors beyond the file, the first already": (
        lambda: gguf(infos=[tensor_info(f"{n:x}", (2**40,)) for n in range(MAX_TENSORS)]),
        "ends at byte",
    ),
    "as many pairs as are read": (lambda: gguf(*(u32_pair(f"{n:x}", n) for n in range(MAX_PAIRS - 9))), "read"),
    "a string of more than is read": (lambda: gguf(pair("k", STRING, text(b"a" * (MB + 1)))), "at most"),
    "strings that grow fourfold": (
        lambda: gguf(*(pair(f"k{n}", STRING, text("\N{GRINNING FACE}".encode() + b"a" * (MB - 4))) for n in range(31))),
        "read|too much",
    ),
    "an array of long strings": (lambda: gguf(strings(*[b"a" * 2**16] * 500)), "read|too much"),
    "an array of empty strings": (lambda: gguf(strings(*[b""] * 1_300_000)), "read"),
    "an array of too many empty strings": (lambda: gguf(strings(*[b""] * 2_500_000)), "too much"),
    "an array of short strings that grow": (lambda: gguf(strings(*[SHORT_ASTRAL] * 1_500_000)), "too much"),
    "an array of too many numbers": (lambda: gguf(array_pair("k", U32, 2_200_000, bytes(8_800_000))), "too much"),
    "numbers as many as are read": (lambda: gguf(array_pair("k", F32, 2_050_000, b"\1\1\1\1" * 2_050_000)), "read"),
    "many arrays of numbers": (
        lambda: gguf(*(array_pair(f"k{n}", F32, 100_000, bytes(400_000)) for n in range(23))),
        "too much",
    ),
    "an alignment of a million numbers": (
        lambda: gguf(array_pair("general.alignment", F32, 1_000_000, array("f", range(1_000_000)).tobytes())),
        "general.alignment is [0.0, 1.0, 2.0",
    ),
    "a million names of templates, which are numbers": (
        lambda: vocabulary(["a"], names=array("I", range(1_000_000))),
        "read",
    ),
    "three parts with heads of 12 MiB": (lambda: three_parts, "at most"),
    "two parts of 40,000 tensors": (lambda: parts_of_many_tensors, "at most"),
    "a head of 200 million": (lambda: rope_of_a_head_of(200_000_000), "head size"),
    "more empty tokens than any vocabulary has": (
        lambda: gguf(
            string_pair("tokenizer.ggml.model", "llama"),
            array_pair("tokenizer.ggml.tokens", STRING, MAX_TOKENS + 1, bytes(8 * (MAX_TOKENS + 1))),
        ),
        "1 to 1048576 tokens",
    ),
    "a token of a megabyte": (lambda: vocabulary(["<unk>", "a" * (MB - 1)]), "at most"),
    "tokens of 1,024 characters": (lambda: vocabulary(own("a" * 1019, 4096)), "read"),
    "tokens of 8 million characters": (lambda: vocabulary(own("a" * 1000, 8000)), "at most"),
    "tokens that are all in each other": (lambda: vocabulary(["a" * n for n in range(1, 1025)]), "merges"),
    "tokens of which any two make a third": (lambda: vocabulary([f"{n:x}" for n in range(1, 600_000)]), "merges"),
    "a vocabulary as large as published ones": (lambda: vocabulary([f"{n:x}" for n in range(1, 150_000)]), "read"),
    "tokens that are all looked for in every text": (
        lambda: vocabulary(own("aaaaa", 100_000), [4] * 100_000),
        "at most",
    ),
    "as many of them as are read": (lambda: vocabulary(own("aaaaa", 2**16), [4] * 2**16), "read"),
    "one merge a million times": (
        lambda: vocabulary(["a", "aa"], model="gpt2", merges=["a a"] * 1_000_000),
        "at most",
    ),
    "one merge as often as is read": (
        lambda: vocabulary(["a", "aa"], model="gpt2", merges=["a a"] * MAX_MERGES),
        "read",
    ),
}
CASES = {**FOLDERS, **GGUFS}
#: Cases that hold what a published vocabulary may hold, and twice as much.
VOCABULARIES = frozenset(
    (
        "an array of empty strings",
        "strings that grow fourfold",
        "an array of long strings",
        "tokens of which any two make a third",
        "a vocabulary as large as published ones",
        "one merge as often as is read",
        "an array of short strings that grow",
    )
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[float, int, str]]:
    root = tmp_path_factory.mktemp("costly")
    first = write_folder(root / "sound", {})
    folders = [first]
    for number, (name, (make, _)) in enumerate(CASES.items()):
        folder = root / str(number)
        folder.mkdir()
        if name in FOLDERS:
            (folder / "config.json").write_bytes((first / "config.json").read_bytes())
            (folder / FILE).write_bytes((first / FILE).read_bytes())
        make()(folder)
        folders.append(folder)
    done = subprocess.run(
        [sys.executable, "-m", "tests.converters.spending"], input=json.dumps([str(folder) for folder in folders]),
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"after {len(lines)} folders: {done.stderr[-3000:]}"
    return dict(zip(CASES, lines[1:], strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_file_costs_little(outcomes: dict[str, tuple[float, int, str]], name: str) -> None:
    seconds, grew, said = outcomes[name]
    assert any(part in said for part in CASES[name][1].split("|")), said
    assert len(said) < 2000
    assert seconds < 5
    assert grew < (2 if name in VOCABULARIES else 1) * 100 * MB
