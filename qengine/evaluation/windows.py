"""Which tokens the model reads together, and which of them count.

    tokens    0 ........ W        stride S: windows start at 0, S, 2 S, ...
    window 0  [ scored         ]
    window 1       [ context | scored  ]       each token is predicted once, from all that its window holds before it

Invariant: every token of a sequence but the first of the first window is scored exactly once, unless windows do not
overlap (stride = window): then the first token of each window has nothing before it and is not scored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens that are read together.

    Attributes:
        token_ids: at least two.
        num_context: leading tokens whose successors are not scored here: those were scored in the window before.
    """

    token_ids: Sequence[int]
    num_context: int

    @property
    def targets(self) -> Sequence[int]:
        """The tokens to predict, from the hidden states at `num_context` and after, without the last."""
        return self.token_ids[self.num_context + 1 :]


def cut(sequences: Sequence[Sequence[int]], window: int, stride: int) -> Iterator[Window]:
    """Windows of all sequences, in order. A rest that is shorter than a window is one too, if it has two tokens."""
    for sequence in sequences:
        scored = 1  # The first token of a sequence has nothing before it.
        for start in range(0, len(sequence), stride):
            end = min(start + window, len(sequence))
            first = max(scored, start + 1)
            if end - first >= 1:
                yield Window(sequence[start:end], first - 1 - start)
            scored = end
            if end == len(sequence):
                break
