"""Memory pressure: how small steps must be after one for which there was no memory.

What a step takes grows with its tokens. So a step that fails halves the budget of those after it, and every few that
run double it, until it is whole again. Invariant: the budget is at least one token, so that something always runs. It
counts steps alone: whom to drop is the scheduler's choice.
"""

from __future__ import annotations

#: Steps in a row that fail before a request must give way.
ATTEMPTS = 3
#: Steps that must run before larger ones are tried.
_RECOVERY_STEPS = 16
#: Requests in a row that had to give way although nothing smaller than their steps could be run.
_HOPELESS = 3


class MemoryPressure:
    """The token budget of steps, `max_num_tokens` as long as memory suffices."""

    def __init__(self, max_num_tokens: int) -> None:
        self._max_num_tokens = max_num_tokens
        self.budget = max_num_tokens
        self._num_failed = 0
        self._num_hopeless = 0
        self._num_run = 0

    @property
    def is_hopeless(self) -> bool:
        """Whether not even single tokens of several requests can be computed any more."""
        return self._num_hopeless >= _HOPELESS

    def on_failed(self, num_tokens: int) -> bool:
        """A step of so many tokens had no memory. Returns whether a request must give way."""
        self._num_run = 0
        self._num_failed += 1
        self.budget = max(1, min(self.budget, num_tokens // 2))
        if self._num_failed < ATTEMPTS:
            return False
        self._num_failed = 0
        self._num_hopeless += num_tokens <= 1
        return True

    def on_run(self) -> None:
        """A step had the memory that it needed."""
        self._num_failed = self._num_hopeless = 0
        if self.budget == self._max_num_tokens:
            return
        self._num_run += 1
        if self._num_run == _RECOVERY_STEPS:
            self._num_run = 0
            self.budget = min(2 * self.budget, self._max_num_tokens)
