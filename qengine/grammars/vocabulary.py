"""Vocabulary: the bytes of every token, in the form the grammar library wants them.

Invariant: it is complete (an entry for each of the model's logits) and plain data, so that it can be sent to another
process. Special tokens have no bytes for a grammar: one that wants them names them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import llguidance

if TYPE_CHECKING:
    from qengine.tokenizer import Tokenizer

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model.

    Attributes:
        tokens: bytes of each id; empty for an id that stands for no text.
        special_ids: tokens that are no text.
        eos_ids: tokens that end an answer, at least one.
        encode: how the model's tokenizer cuts text; None where that does not matter.
    """

    tokens: tuple[bytes, ...]
    special_ids: frozenset[int]
    eos_ids: frozenset[int]
    encode: Encode | None = field(default=None, compare=False)

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocab_size: int, eos_ids: frozenset[int]) -> Vocabulary:
        """The vocabulary of a model with `vocab_size` logits."""
        return cls(
            tokens=tuple(tokenizer.token_bytes(token_id) for token_id in range(vocab_size)),
            special_ids=tokenizer.special_token_ids | eos_ids,
            eos_ids=eos_ids,
            encode=lambda text: tokenizer.encode(text, add_special_tokens=False),
        )

    def cut(self, data: bytes) -> list[int]:
        """Tokens of a text that must begin in the middle of an answer: the model's own way of cutting if it fits."""
        if self.encode is not None:
            ids = list(self.encode(data.decode("utf-8", "replace")))
            if b"".join(self.tokens[token_id] for token_id in ids) == data:
                return ids
        return self._cut_greedily(data)

    def _cut_greedily(self, data: bytes) -> list[int]:
        ids, place = [], 0
        while place < len(data):
            ends = range(min(len(data), place + self._longest), place, -1)
            end = next((end for end in ends if data[place:end] in self._ids), None)
            if end is None:  # No token has this byte: nothing can write it.
                place += 1
                continue
            ids.append(self._ids[data[place:end]])
            place = end
        return ids

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        return {data: i for i, data in enumerate(self.tokens) if data and i not in self.special_ids}

    @cached_property
    def _longest(self) -> int:
        return max((len(data) for data in self._ids), default=1)

    @cached_property
    def for_library(self) -> llguidance.LLTokenizer:
        """The library's own form; takes a tenth of a second to make."""
        wrapper = llguidance.TokenizerWrapper(_Adapter(self))
        return llguidance.LLTokenizer(wrapper, n_vocab=len(self.tokens), eos_token=sorted(self.eos_ids))


class _Adapter:
    """The attributes that the library reads."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens = vocabulary.tokens
        self.special_token_ids = sorted(vocabulary.special_ids)
        self.eos_token_id = min(vocabulary.eos_ids)
        self.bos_token_id = None
        self._cut = vocabulary.cut

    def __call__(self, text: bytes) -> list[int]:
        return self._cut(text)
