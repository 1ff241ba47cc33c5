"""Log-probabilities in OpenAI's two shapes: chat's list of objects and completions' parallel lists.

Invariant: streamed pieces, joined, equal the whole. Values are finite: JSON has no infinity, so an impossible token
shows MIN_LOGPROB. Which tokens are reported is the engine's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qengine.request import Logprob, PositionLogprobs
from qengine.tokenizer import IncrementalDetokenizer, Tokenizer

MIN_LOGPROB = -9999.0
#: Positions whose shape is made in one go in the event loop: some milliseconds, with twenty tokens at each.
SLICE_POSITIONS = 128


def chat_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], positions: Sequence[PositionLogprobs | None], num_top: int
) -> dict[str, Any]:
    """The "logprobs" of a chat choice: each token with its bytes, and the `num_top` likeliest at its place."""
    content = []
    for token_id, position in zip(token_ids, positions, strict=True):
        assert position is not None, "chat tells of the answer's tokens only"
        top = [(rank, other) for other in position if (rank := position[other].rank) is not None and rank <= num_top]
        chosen = _chat_entry(tokenizer, token_id, position)
        content.append({**chosen, "top_logprobs": [_chat_entry(tokenizer, t, position) for _, t in sorted(top)]})
    return {"content": content, "refusal": None}


def prompt_logprobs(tokenizer: Tokenizer, positions: Sequence[PositionLogprobs | None]) -> list[dict[str, Any] | None]:
    """vLLM's "prompt_logprobs": for each token of a prompt what could stand there, by token id; None for the first."""
    shown: list[dict[str, Any] | None] = []
    for position in positions:
        entries = None if position is None else {str(i): _prompt_entry(tokenizer, i, e) for i, e in position.items()}
        shown.append(entries)
    return shown


def _prompt_entry(tokenizer: Tokenizer, token_id: int, entry: Logprob) -> dict[str, Any]:
    shown = tokenizer.token_text(token_id)
    return {"logprob": _finite(entry.logprob), "rank": entry.rank, "decoded_token": shown}


def _chat_entry(tokenizer: Tokenizer, token_id: int, position: PositionLogprobs) -> dict[str, Any]:
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": _finite(position[token_id].logprob),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


def _finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)


class LegacyLogprobs:
    """Makes the "logprobs" of a completions choice, piece by piece.

    `text_offset` is where a token's text begins in the choice's text; a token that only begins a character has the
    offset at which the character will be.

    Args:
        tokenizer: whose tokens they are.
        prompt_token_ids: what the tokens continue; empty if the prompt itself is reported (echo).
        skip_special_tokens: as for the text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, prompt_token_ids=prompt_token_ids, skip_special_tokens=skip_special_tokens
        )
        self._offset = 0

    def take(self, token_ids: Sequence[int], positions: Sequence[PositionLogprobs | None]) -> dict[str, Any]:
        """The lists for the next tokens. A position is None where nothing is known: the first token of a prompt."""
        offsets = []
        for token_id in token_ids:
            offsets.append(self._offset)
            self._offset += len(self._detokenizer.feed([token_id]))
        pairs = list(zip(token_ids, positions, strict=True))
        return {
            "tokens": [self._tokenizer.token_text(token_id) for token_id in token_ids],
            "token_logprobs": [None if p is None else _finite(p[token_id].logprob) for token_id, p in pairs],
            "top_logprobs": [None if p is None else self._by_text(p) for _, p in pairs],
            "text_offset": offsets,
        }

    def _by_text(self, position: PositionLogprobs) -> dict[str, float]:
        """Log-probabilities by the tokens' text; of tokens that look the same, the likeliest counts."""
        by_text: dict[str, float] = {}
        for token_id, entry in sorted(position.items(), key=lambda item: -item[1].logprob):
            by_text.setdefault(self._tokenizer.token_text(token_id), _finite(entry.logprob))
        return by_text
