"""A small SentencePiece BPE vocabulary as GGUF metadata, and SentencePiece's algorithm written down plainly.

The algorithm is the reference: it has no list of merges, only scores, and merges the best-scored pair while there is
one.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import pairwise
from typing import Any

SPACE = "▁"
CORPUS = (
    "the cat sat on the mat and the other cat ate the rat. it was then that the hat came over there, "
    "where the weather was better than ever; whatever they were thinking, the answer was no more than a letter. "
    "naïve café, übergroß, straße. numbers 10 20 2024 1999 and a list [a, b, c] = {x: y}. 你好 世界 你好"
)
#: Left out of the vocabulary: they must be spelled in bytes.
UNKNOWN_CHARACTERS = frozenset("世y")


def _train(num_merges: int) -> list[str]:
    """Pieces of byte-pair merging over CORPUS, in the order found."""
    words = Counter(SPACE + word for word in CORPUS.split())
    splits = {word: list(word) for word in words}
    pieces: list[str] = []
    while len(pieces) < num_merges:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in splits.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = max(sorted(pairs), key=pairs.__getitem__)
        if "".join(best) not in pieces:
            pieces.append("".join(best))
        for word, parts in splits.items():
            splits[word] = _merge_all(parts, best)
    return pieces


def _merge_all(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


@cache
def _pieces() -> tuple[tuple[str, float, int], ...]:
    """(text, score, token type) of every id."""
    special = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    data = [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    merged = [piece for piece in _train(120) if not UNKNOWN_CHARACTERS & {*piece}]
    characters = sorted({*CORPUS, SPACE} - UNKNOWN_CHARACTERS - {" "})
    normal = [(text, -float(rank), 1) for rank, text in enumerate([*merged, *characters])]
    return (*special, *data, *normal, ("<tool>", 0.0, 4))


def sentencepiece_metadata(**changes: Any) -> dict[str, Any]:
    """GGUF metadata of the vocabulary; `changes` replace values of "tokenizer.ggml.NAME" (None removes one)."""
    tokens, scores, types = (list(column) for column in zip(*_pieces(), strict=True))
    values: dict[str, Any] = {
        "model": "llama",
        "tokens": tokens,
        "scores": scores,
        "token_type": types,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **changes,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in values.items() if value is not None}


def reference_ids(text: str) -> list[int]:
    """Ids of `text` (without added tokens), by SentencePiece's definition, with the dummy space at its start."""
    table = {piece: (score, token_id) for token_id, (piece, score, kind) in enumerate(_pieces()) if kind == 1}
    parts = list(SPACE + text.replace(" ", SPACE)) if text else []
    while True:
        candidates = [
            (-table[left + right][0], position)
            for position, (left, right) in enumerate(pairwise(parts))
            if left + right in table
        ]
        if not candidates:
            break
        _, position = min(candidates)
        parts[position : position + 2] = [parts[position] + parts[position + 1]]
    first_byte = 3
    ids: list[int] = []
    for part in parts:
        ids.extend([table[part][1]] if part in table else [first_byte + byte for byte in part.encode()])
    return ids
