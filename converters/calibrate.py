"""Texts that a quantizer watches a model read: from a file, from the hub, or the builtin set.

    "builtin" | FILE.txt | FILE.jsonl | hub id  ->  CalibrationTexts  ->  CalibrationSet (token ids by sample)

Invariants: the same source, tokenizer and sizes give the same samples; separate texts stay separate samples (cut to
`seq_len`, never packed, because a model that reads one text after another attends to what does not belong together).
A .txt file is one running text and gives consecutive pieces. Nothing of a file is executed; it is read within a bound.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from converters.calibration_builtin import builtin_texts
from converters.calibration_hub import fetch_from_hub
from converters.errors import CheckpointError
from converters.files import DataFile, shown

BUILTIN = "builtin"
#: With fewer, quantizers fit what the samples have in common by chance.
FEW_SAMPLES = 64
MAX_FILE_BYTES = 256 * 2**20
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[^:]+)?")
#: A running text is split by characters before it is tokenized, with this much in reserve for pieces that take fewer
#: tokens than the measured average.
_RESERVE = 1.25
_MEASURED_CHARS = 20_000

_logger = logging.getLogger(__name__)


class TextEncoder(Protocol):
    """What is asked of a tokenizer; qengine's `Tokenizer` fits."""

    @property
    def chat_template(self) -> str | None:
        """None if conversations have no form of this model's own."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> Sequence[int]:
        """Token ids; `add_special_tokens` adds what the model expects around a text."""

    def render_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """A conversation as the model's own text, special tokens written out."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages with "role" and "content", to be put in the form of the model's chat template."""

    messages: tuple[Mapping[str, str], ...]


@dataclass(frozen=True, slots=True)
class CalibrationTexts:
    """Texts of one source.

    Attributes:
        name: the source, for reports and model cards.
        rows: separate texts and conversations; or parts of one running text, to be joined.
        is_running: whether the rows are one text that goes on.
    """

    name: str
    rows: tuple[str | Conversation, ...]
    is_running: bool = False


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """What a quantizer reads.

    Attributes:
        name: the source of the texts.
        samples: int64 [len], 1 <= len <= seq_len, one sequence each.
        seq_len: the length to which texts were cut, in tokens.
    """

    name: str
    samples: tuple[torch.Tensor, ...]
    seq_len: int

    @property
    def num_tokens(self) -> int:
        """In all samples."""
        return sum(len(sample) for sample in self.samples)

    @property
    def sha256(self) -> str:
        """Of the token ids: two runs with the same digest were calibrated alike."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(json.dumps(sample.tolist()).encode() + b"\n")
        return digest.hexdigest()


def calibration_set(
    source: str, encoder: TextEncoder, *, num_samples: int = 128, seq_len: int = 2048
) -> CalibrationSet:
    """Read `source` and make its samples: `load_texts`, then `make_samples`."""
    return make_samples(load_texts(source), encoder, num_samples=num_samples, seq_len=seq_len)


# Reading


def load_texts(source: str) -> CalibrationTexts:
    """Texts of "builtin", a .txt file, a .jsonl file, or a dataset of the hub ("organization/name", or
    "organization/name:FILE" for one of its files).

    Rows of JSONL have a "text", or "messages" (a conversation, as in OpenAI's format).

    Raises:
        CheckpointError: there is no such source, or it is no text, empty, a single line, or larger than 256 MiB.
    """
    if source == BUILTIN:
        rows = (row if isinstance(row, str) else Conversation(tuple(row)) for row in builtin_texts())
        return CalibrationTexts(BUILTIN, tuple(rows))
    path = Path(source).expanduser()
    repository, _, name = source.partition(":")
    is_file_name = not name and path.suffix in (".txt", ".jsonl")
    if not is_file_name and not path.exists() and _HUB_ID.fullmatch(source):
        path = fetch_from_hub(repository, name or None)
    return CalibrationTexts(source, *_read_file(path))


def _read_file(path: Path) -> tuple[tuple[str | Conversation, ...], bool]:
    readers = {".txt": (_running_text, True), ".jsonl": (_json_rows, False)}
    if path.suffix not in readers:
        raise CheckpointError(
            f"calibration texts '{shown(path)}': expected 'builtin', a .txt file (one running text), a .jsonl file "
            "(one text a row), or a dataset of the hub such as organization/name"
        )
    read, is_running = readers[path.suffix]
    return read(_read_text(path), path), is_running


def _read_text(path: Path) -> str:
    file = DataFile.at(path)
    if file.num_bytes > MAX_FILE_BYTES:
        raise CheckpointError(
            f"{path} has {file.num_bytes / 2**20:.0f} MiB, at most {MAX_FILE_BYTES // 2**20} are read; take a part, "
            f"for example: head -n 20000 {path.name} > part{path.suffix}"
        )
    data = file.read_bytes(0, file.num_bytes)
    at = data.find(b"\0")
    if at >= 0:
        raise CheckpointError(f"{path} is a binary file (a zero byte at {at}), expected text in UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path} is not text in UTF-8 (byte 0x{data[error.start]:02x} at {error.start}); convert it, for example "
            f"with: iconv -f latin1 -t utf-8 {path.name}"
        ) from error
    if not text.strip():
        raise CheckpointError(f"{path} is empty, expected text to calibrate with")
    return text


def _running_text(text: str, path: Path) -> tuple[str, ...]:
    lines = tuple(text.splitlines(keepends=True))
    if sum(1 for line in lines if line.strip()) < 2:
        raise CheckpointError(
            f"{path} has one line of text, expected a running text of many lines; for separate texts write a .jsonl "
            'file with a row {"text": ...} for each'
        )
    return lines


def _json_rows(text: str, path: Path) -> tuple[str | Conversation, ...]:
    # Not splitlines(): JSON strings may hold U+2028 and its kind as they are.
    numbered = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if len(numbered) < 2:
        raise CheckpointError(
            f"{path} has one row, expected one row for each text, at least {FEW_SAMPLES} of them for a good result"
        )
    rows = [_json_row(line, f"{path}, line {number}") for number, line in numbered]
    kept = tuple(row for row in rows if not isinstance(row, str) or row.strip())
    if not kept:
        raise CheckpointError(f"{path} has {len(rows)} rows, and the text of each is empty")
    return kept


def _json_row(line: str, where: str) -> str | Conversation:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f'{where} is not JSON ({shown(error)}), expected an object such as {{"text": ...}}'
        ) from error
    fields = row if isinstance(row, dict) else {}
    text, messages = fields.get("text"), fields.get("messages")
    if isinstance(text, str):
        _require_unicode(text, where)
        return text
    if isinstance(messages, list) and messages and all(_is_message(message) for message in messages):
        for message in messages:
            _require_unicode(message["content"], where)
        return Conversation(tuple({"role": m["role"], "content": m["content"]} for m in messages))
    found = f"the keys {shown(', '.join(fields) or 'none')}" if isinstance(row, dict) else f"a {type(row).__name__}"
    raise CheckpointError(
        f'{where} has {found}, expected "text" (a string) or "messages" (a list of objects with the strings "role" and '
        '"content")'
    )


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _require_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{where} holds half of a surrogate pair at character {error.start}, no text") from error


# Samples


def make_samples(
    texts: CalibrationTexts, encoder: TextEncoder, *, num_samples: int = 128, seq_len: int = 2048
) -> CalibrationSet:
    """Token ids of at most `num_samples` texts, each cut to `seq_len`; warns below 64 samples.

    Where there are more texts than asked for, they are taken at even distances, so that every part of the source is
    seen. Conversations go through the model's chat template; without one they are written as plain turns.

    Raises:
        CheckpointError: if a size is below 1, or the texts give no token.
    """
    for name, value in (("num_samples", num_samples), ("seq_len", seq_len)):
        if value < 1:
            raise CheckpointError(f"{name} is {value}, expected at least 1")
    rows = _pieces(texts.rows, encoder, seq_len) if texts.is_running else texts.rows
    samples = []
    for row in evenly(rows, num_samples):
        ids = encode_row(row, encoder)[:seq_len]
        if ids:
            samples.append(torch.tensor(ids, dtype=torch.int64))
    if not samples:
        raise CheckpointError(f"the calibration texts of {texts.name} give no token with this model's tokenizer")
    if len(samples) < FEW_SAMPLES:
        reason = f"the source has {len(rows)}" if len(rows) < num_samples else f"{num_samples} were asked for"
        _logger.warning(
            "calibration with %d samples (%s): fewer than %d give a model that may fit them and little else",
            len(samples), reason, FEW_SAMPLES,
        )  # fmt: skip
    return CalibrationSet(texts.name, tuple(samples), seq_len)


def evenly(rows: Sequence[Any], count: int) -> Sequence[Any]:
    """`count` of the rows at even distances, or all where there are no more."""
    return rows if len(rows) <= count else [rows[index * len(rows) // count] for index in range(count)]


def encode_row(row: str | Conversation, encoder: TextEncoder) -> list[int]:
    """Token ids of one text or conversation, with what the model expects around it."""
    if isinstance(row, str):
        return list(encoder.encode(row))
    if encoder.chat_template is None:
        turns = (f"{message['role'].capitalize()}: {message['content']}" for message in row.messages)
        return list(encoder.encode("\n\n".join(turns)))
    text = encoder.render_chat(row.messages, add_generation_prompt=False)
    return list(encoder.encode(text, add_special_tokens=False))


def _pieces(lines: Sequence[Any], encoder: TextEncoder, seq_len: int) -> list[str]:
    """A running text in pieces of about `seq_len` tokens or a little more, from line to line where lines are short."""
    text = "".join(lines)
    measured = text[:_MEASURED_CHARS]
    chars_per_token = len(measured) / max(1, len(encoder.encode(measured)))
    size = max(1, round(seq_len * chars_per_token * _RESERVE))
    pieces, start = [], 0
    while start < len(text):
        end = min(start + size, len(text))
        line_end = text.rfind("\n", start + size // 2, end) + 1
        if end < len(text) and line_end:
            end = line_end
        if text[start:end].strip():
            pieces.append(text[start:end])
        start = end
    return pieces
