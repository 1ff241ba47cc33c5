"""The builtin calibration texts: what every Python installation has, and what this project wrote for the purpose.

Parts of the language's reference (`pydoc_data.topics`) and of the standard library's source, prose, lists and data,
code in several languages, several natural languages, and conversations. No download, and weaker than texts of one's
own domain: two thirds are about Python. Some topics are left out, so that a model can be measured on what it was not
calibrated with. The texts that come with Python change with its version: a report carries the digest of the tokens.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from pydoc_data.topics import topics

#: Left for measuring (`qengine evaluate --text builtin`).
HELD_OUT_TOPICS = frozenset({"debugger", "execmodel", "import", "typesmapping"})
_OWN_FOLDER = Path(__file__).with_name("calibration_texts")
_OWN_FILES = ("prose.txt", "lists.txt", "code.txt", "languages.txt")
_SEPARATOR = "\n%%\n"
_SOURCES = (
    "bisect.py",
    "calendar.py",
    "cmd.py",
    "colorsys.py",
    "csv.py",
    "fractions.py",
    "graphlib.py",
    "heapq.py",
    "html/parser.py",
    "json/encoder.py",
    "queue.py",
    "sched.py",
    "shlex.py",
    "statistics.py",
    "string.py",
    "textwrap.py",
)
#: About 1,500 to 2,000 tokens.
_PART_CHARS = 6000
_MAX_PARTS_PER_SOURCE = 2

Messages = Sequence[Mapping[str, str]]


def builtin_texts() -> list[str | Messages]:
    """About 130 texts and conversations, one kind after the other, in the same order at every call."""
    return [*_reference(), *_library(), *_own_texts(), *_own_conversations()]


def held_out_texts() -> list[str]:
    """What the builtin calibration leaves for measuring: long topics of the reference, about 50,000 characters."""
    return [topics[name] for name in sorted(HELD_OUT_TOPICS & topics.keys())]


def _reference() -> Iterator[str]:
    """Longest topics first; a paragraph that several of them share is taken once."""
    seen = {paragraph for name in HELD_OUT_TOPICS for paragraph in topics.get(name, "").split("\n\n")}
    for name in sorted(topics.keys() - HELD_OUT_TOPICS, key=lambda name: (-len(topics[name]), name)):
        paragraphs = [paragraph for paragraph in topics[name].split("\n\n") if paragraph not in seen]
        seen.update(paragraphs)
        yield from _parts(paragraphs)


def _library() -> Iterator[str]:
    folder = Path(sysconfig.get_path("stdlib"))
    for name in _SOURCES:
        path = folder / name
        if path.is_file():  # Some distributions of Python come without sources.
            yield from list(_parts(path.read_text(encoding="utf-8").split("\n\n")))[:_MAX_PARTS_PER_SOURCE]


def _parts(paragraphs: Sequence[str]) -> Iterator[str]:
    """Paragraphs joined to texts of about the same length; a short rest is left out."""
    part: list[str] = []
    size = 0
    for paragraph in paragraphs:
        part.append(paragraph)
        size += len(paragraph) + 2
        if size >= _PART_CHARS:
            yield "\n\n".join(part)
            part, size = [], 0
    if size >= _PART_CHARS // 3:
        yield "\n\n".join(part)


def _own_texts() -> Iterator[str]:
    for name in _OWN_FILES:
        for text in (_OWN_FOLDER / name).read_text(encoding="utf-8").split(_SEPARATOR):
            yield text.strip("\n")


def _own_conversations() -> Iterator[Messages]:
    for line in (_OWN_FOLDER / "chat.jsonl").read_text(encoding="utf-8").splitlines():
        messages: Messages = json.loads(line)["messages"]
        yield messages
