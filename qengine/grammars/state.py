"""GrammarState: how far one sequence has come in its grammar, and which tokens may be next.

Invariant: `allowed` always holds at least one token, and is ready before it is asked for: it is worked out when a token
is accepted. The state belongs to one sequence and one thread.
"""

from __future__ import annotations

import llguidance
import numpy as np

from qengine.errors import GrammarError
from qengine.grammars.library import readable


class GrammarState:
    """A `TokenGrammar`.

    Args:
        matcher: a parser of its own, at the beginning.
        eos_ids: tokens that end the answer.
        ending_ids: the request's stop tokens: like those, not allowed before `min_tokens` tokens exist, unless the
            grammar leaves nothing else.
    """

    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        eos_ids: frozenset[int],
        *,
        ending_ids: frozenset[int] = frozenset(),
        min_tokens: int = 0,
    ) -> None:
        self._matcher = matcher
        self._eos_ids = eos_ids
        self._ending_ids = ending_ids | eos_ids
        self._num_before_end = min_tokens
        self.is_complete = False
        self.allowed = self._next()

    def accept(self, token_id: int) -> None:
        """Move on by one token.

        Raises:
            GrammarError: see `TokenGrammar`.
        """
        if self.is_complete:
            raise GrammarError("the answer has ended; its grammar allows no further token")
        self._num_before_end -= 1
        if token_id in self._eos_ids and self._allows(token_id):
            self.is_complete = True
            return
        if not self._matcher.consume_token(token_id):
            raise GrammarError(f"the grammar does not go on: {readable(self._matcher.get_error())}")
        self.allowed = self._next()

    def _allows(self, token_id: int) -> bool:
        return bool(self.allowed[token_id // 8] >> token_id % 8 & 1)

    def _next(self) -> bytes:
        words = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise GrammarError(f"the grammar does not go on: {readable(self._matcher.get_error())}")
        if self._num_before_end > 0:
            words = _without(words, self._ending_ids)
        if not words.strip(b"\0"):
            raise GrammarError("the grammar leaves no token to go on with")
        return words


def _without(words: bytes, token_ids: frozenset[int]) -> bytes:
    """The bits without some tokens'; unchanged if nothing would be left."""
    bits = np.frombuffer(words, np.uint8).copy()
    for token_id in token_ids:
        bits[token_id // 8] &= ~np.uint8(1 << token_id % 8)
    return bits.tobytes() if bits.any() else words
