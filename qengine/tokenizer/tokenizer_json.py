"""A look at the bytes of tokenizer.json before the library reads them, which normalizes added tokens on the way.

Invariant: every value that the file gives to a key of a part, however the key is spelled and wherever it stands, was
judged. So the file need not be read as a whole twice: keys are found by an expression, and their values are small.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from qengine.errors import LoadError
from qengine.tokenizer.limits import (
    MAX_TOKEN_CHARS,
    Ways,
    require_few_steps,
    require_simple_patterns,
    require_small_additions,
    require_small_stretch,
)
from qengine.tokenizer.rust_errors import shorten

#: The largest published file has 33 MB.
MAX_TOKENIZER_BYTES = 2**26
#: Published files have up to 514,000 brackets (pairs to merge) and 1.9 million commas.
_MAX_BRACKETS = 2**20
_MAX_COMMAS = 2**22
#: Of a normalizer and its kind; maps of characters have up to 0.4 MB.
_MAX_PART_BYTES = 2**21
#: Of all added tokens; 6,400 of them have 1 MB.
_MAX_ADDED_BYTES = 2**23
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
#: Texts that the model puts to each piece of a word.
_AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix", "unk_token")
_MAX_AFFIX_CHARS = 256
_MAX_WORD_CHARS = 1000
_KEYS = frozenset((*_PARTS, *_AFFIXES, "added_tokens", "max_input_chars_per_word"))
#: A key also stands in the vocabulary, if it is a token.
_MAX_TIMES = 16
#: JSON allows a letter to be written as \u00xx. No program that writes JSON does so.
_ESCAPED_LETTER = re.compile(rb"\\u00(?:5[fF]|6[0-9a-fA-F]|7[0-9aA])")
_COLON = re.compile(rb"[ \t\n\r]*:[ \t\n\r]*")
#: Any spelling of a key of these letters.
_KEY = re.compile(rb'"((?:[a-z_]|\\u00[0-9a-fA-F]{2}){7,160})"[ \t\n\r]*:[ \t\n\r]*')


def check_tokenizer_json(data: bytes, where: object) -> None:
    """Refuse a tokenizer.json that would take memory or time without end when it is loaded or used.

    Raises:
        LoadError: with what was found.
    """
    num_brackets, num_commas = data.count(b"{") + data.count(b"["), data.count(b",")
    if num_brackets > _MAX_BRACKETS or num_commas > _MAX_COMMAS:
        raise LoadError(f"{where} has {num_brackets + num_commas} values, more than any published tokenizer")
    # Of several normalizers one is used, and which is the library's to say.
    normalizers, patterns, added = list[object](), list[Ways](), list[tuple[str, bool]]()
    for key, value in _values(data, where):
        if key in _PARTS:
            require_few_steps(value, f"{where}: its {key}")
            ways = require_simple_patterns(value, f"{where}: its {key}")
            patterns.extend(ways if key == "normalizer" else ())
        if key == "normalizer":
            require_small_stretch(value, where)
            normalizers.append(value)
        elif key == "added_tokens":
            added.extend(_added_tokens(value, where))
        elif key in _AFFIXES and isinstance(value, str) and len(value) > _MAX_AFFIX_CHARS:
            raise LoadError(f"{where}: its {key} has {len(value)} characters, at most {_MAX_AFFIX_CHARS} are allowed")
        elif key == "max_input_chars_per_word" and isinstance(value, int | float) and value > _MAX_WORD_CHARS:
            raise LoadError(f"{where}: its {key} is {value}, at most {_MAX_WORD_CHARS} is allowed")
    require_small_additions(added, normalizers, patterns, where)


def _values(data: bytes, where: object) -> Iterator[tuple[str, Any]]:
    """(key, value) wherever one of _KEYS has a value that is no plain number of a vocabulary."""
    num_found = 0
    for key, start in _spelled(data) if _ESCAPED_LETTER.search(data) else _plain(data):
        if data[start : start + 1].isdigit() and key != "max_input_chars_per_word":
            continue
        num_found += 1
        if num_found > _MAX_TIMES:
            raise LoadError(f"{where} has its parts, such as {key}, more than {_MAX_TIMES} times")
        most = _MAX_ADDED_BYTES if key == "added_tokens" else _MAX_PART_BYTES
        yield key, _decoded(data[start : start + most], f"{where}: its {key}")


def _plain(data: bytes) -> Iterator[tuple[str, int]]:
    """(key, where its value begins) of keys written as they are."""
    for key in sorted(_KEYS):
        quoted = f'"{key}"'.encode()
        position = data.find(quoted)
        while position >= 0:
            position += len(quoted)
            colon = _COLON.match(data, position)
            if colon is not None:
                yield key, colon.end()
            position = data.find(quoted, position)


def _spelled(data: bytes) -> Iterator[tuple[str, int]]:
    """The same of keys in any spelling, which takes longer."""
    for match in _KEY.finditer(data):
        key = match[1].decode() if b"\\" not in match[1] else str(json.loads(b'"' + match[1] + b'"'))
        if key in _KEYS:
            yield key, match.end()


def _decoded(data: bytes, what: str) -> Any:
    """The JSON value that begins `data`, with each key once: readers differ in which of two they take."""
    try:
        value, _ = json.JSONDecoder(object_pairs_hook=_unique).raw_decode(data.decode("utf-8", "ignore"))
    except (ValueError, RecursionError) as error:
        raise LoadError(
            f"{what} is not a readable tokenizer's, or has more than {len(data)} bytes ({shorten(str(error))}); "
            "download the file again"
        ) from error
    return value


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _added_tokens(tokens: object, where: object) -> Iterator[tuple[str, bool]]:
    """The text of each added token, and whether it is normalized."""
    for token in tokens if isinstance(tokens, list) else []:
        text = token.get("content") if isinstance(token, dict) else None
        if not isinstance(text, str):
            continue
        if len(text) > MAX_TOKEN_CHARS:
            raise LoadError(f"{where} adds a token of {len(text)} characters, at most {MAX_TOKEN_CHARS} are allowed")
        yield text, token.get("normalized") is not False
