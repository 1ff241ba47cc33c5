"""Texts to measure with, as token ids: "builtin", a file, or a dataset of the hub.

Files are read as for calibration. A .txt file is one sequence; each row of a .jsonl file is a sequence of its own, and
conversations go through the model's chat template. The builtin text is what the builtin calibration leaves out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from converters.calibrate import BUILTIN, CalibrationTexts, encode_row, load_texts
from converters.calibration_builtin import held_out_texts
from converters.errors import CheckpointError
from qengine.errors import ConfigError
from qengine.tokenizer import Tokenizer

#: A longer running text is tokenized in parts, from line to line. WikiText-2's test set (1.3 MB) is one part.
_PART_CHARS = 4_000_000
_LEAST_TOKENS = 2


@dataclass(frozen=True, slots=True)
class TokenText:
    """Sequences of token ids, each of at least two tokens, and where they come from."""

    name: str
    sequences: tuple[Sequence[int], ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(sequence) for sequence in self.sequences)


def load_text(source: str) -> CalibrationTexts:
    """Read a source.

    Raises:
        ConfigError: there is no such source, or it is not readable as text.
    """
    if source == BUILTIN:
        return CalibrationTexts(BUILTIN, tuple(held_out_texts()))
    try:
        return load_texts(source)
    except CheckpointError as error:
        raise ConfigError(f"--text: {error}") from error


def tokenize(texts: CalibrationTexts, tokenizer: Tokenizer, max_tokens: int | None = None) -> TokenText:
    """Token ids, at most the first `max_tokens`.

    Raises:
        ConfigError: if fewer than two tokens come of it.
        RequestError: if a conversation does not fit the chat template.
    """
    sequences: list[Sequence[int]] = []
    room = max_tokens
    for ids in _sequences(texts, tokenizer, max_tokens):
        taken = ids if room is None else ids[:room]
        if len(taken) >= _LEAST_TOKENS:
            sequences.append(taken)
        if room is not None:
            room -= len(taken)
            if room < _LEAST_TOKENS:
                break
    if not sequences:
        raise ConfigError(f"--text: {texts.name} gives fewer than two tokens in a row, so there is nothing to predict")
    return TokenText(texts.name, tuple(sequences))


def _sequences(texts: CalibrationTexts, tokenizer: Tokenizer, max_tokens: int | None) -> Iterator[Sequence[int]]:
    if not texts.is_running:
        for row in texts.rows:
            yield encode_row(row, tokenizer)
        return
    ids: list[int] = []
    for part in _parts("".join(row for row in texts.rows if isinstance(row, str))):
        ids += tokenizer.encode(part, add_special_tokens=not ids)
        if max_tokens is not None and len(ids) >= max_tokens:
            break
    yield ids


def _parts(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = start + _PART_CHARS
        line_end = text.rfind("\n", start, end) + 1
        if end < len(text) and line_end:
            end = line_end
        yield text[start:end]
        start = end
