"""Which tokens each sequence has held, for penalties, kept up to date from step to step.

Counting a long prompt takes longer than the device takes for a step, so what was counted is kept as long as its
sequence comes back in every step. Invariant: the answer is that of counting afresh; a sequence is known by its very
lists, of which the prompt never changes and the output only grows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qengine.scheduling.batch import SampleSpec

Ids = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(slots=True)
class History:
    """One sequence: the distinct ids of its prompt, and how often each id is in its output."""

    prompt: Sequence[int]
    output: Sequence[int]
    prompt_ids: Ids
    counts: Counter[int] = field(default_factory=Counter)
    num_counted: int = 0

    def catch_up(self) -> None:
        """Count what was appended to the output."""
        self.counts.update(self.output[self.num_counted :])
        self.num_counted = len(self.output)

    @property
    def output_ids(self) -> Ids:
        """Distinct ids of the output, in the order of `times`."""
        return np.fromiter(self.counts.keys(), np.int64, len(self.counts))

    @property
    def times(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """How often each of `output_ids` occurs."""
        return np.fromiter(self.counts.values(), np.float64, len(self.counts))


class Histories:
    """The histories of the sequences of the last step."""

    def __init__(self) -> None:
        self._known: dict[int, History] = {}

    def of(self, specs: Sequence[SampleSpec]) -> list[History | None]:
        """The history of each row that has penalties, None for the others; forgets sequences that are not here."""
        found = [self._find(spec) if spec.params.has_penalties else None for spec in specs]
        self._known = {id(history.output): history for history in found if history is not None}
        return found

    def _find(self, spec: SampleSpec) -> History:
        prompt, output = spec.prompt_token_ids, spec.output_token_ids
        known = self._known.get(id(output))
        if known is None or known.prompt is not prompt or known.output is not output:
            known = History(prompt, output, np.unique(np.asarray(prompt, dtype=np.int64)))
        known.catch_up()
        return known
