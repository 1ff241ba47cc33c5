"""What keeps a checkpoint from fitting a model, and what is merely odd about it.

A `Report` collects every problem and raises them as one error; `Notices` log an oddity once per file however many
layers share it. Invariant: the text stays short, whatever the file holds.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from converters.errors import CheckpointError
from converters.files import shown

_MAX_LINES = 20


def shape_text(dtype: str, shape: Sequence[int]) -> str:
    """A tensor in words, e.g. "F16 [32, 4096]"."""
    return f"{dtype} [{', '.join(map(str, shape))}]"


class Report:
    """Problems of one checkpoint, in the order in which they were found."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lines: list[str] = []

    def missing(self, name: str, expected: str) -> None:
        """A tensor that the model needs and the file lacks."""
        self._lines.append(f"missing: {shown(name)}, expected {expected}")

    def wrong(self, name: str, found: str, expected: str) -> None:
        """A tensor of the wrong shape or type."""
        self._lines.append(f"wrong: {shown(name)} is {found}, expected {expected}")

    def leftover(self, name: str, found: str) -> None:
        """A tensor that no part of the model uses."""
        self._lines.append(f"left over: {shown(name)} ({found}) belongs to no part of the model")

    def raise_if_any(self) -> None:
        """Raise all problems as one CheckpointError, the first 20 in full."""
        if not self._lines:
            return
        shown_lines = self._lines[:_MAX_LINES]
        if len(self._lines) > _MAX_LINES:
            shown_lines.append(f"... and {len(self._lines) - _MAX_LINES} more")
        count = f"{len(self._lines)} problem" + ("s" if len(self._lines) > 1 else "")
        raise CheckpointError(
            f"{self._path}: the tensors do not fit the model ({count}); "
            "the download may be incomplete, or config.json may belong to another model\n  " + "\n  ".join(shown_lines)
        )


class Notices:
    """Warnings about one checkpoint, each said once."""

    def __init__(self, logger: logging.Logger, path: str) -> None:
        self._logger = logger
        self._path = path
        self._said: set[str] = set()

    def warn(self, topic: str, message: str) -> None:
        """Log `message`, unless this topic has been mentioned for this file."""
        if topic not in self._said:
            self._said.add(topic)
            self._logger.warning("%s: %s", self._path, message)
