"""Everything that is wrong with a checkpoint, reported at once.

Invariant: one error lists missing, leftover, mis-shaped and unsupported tensors together, each kind shortened to its
first names. It judges nothing itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from converters.errors import CheckpointError

MAX_LISTED = 8


class Problems:
    """Collects the mismatches of one checkpoint."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._kinds: dict[str, list[str]] = {}

    def missing(self, name: str) -> None:
        """A tensor that the model needs and the file does not have."""
        self._kinds.setdefault("missing", []).append(name)

    def misshaped(self, name: str, found: Sequence[int], expected: Sequence[int] | str) -> None:
        """A tensor of another shape than the model's."""
        wanted = expected if isinstance(expected, str) else list(expected)
        self._kinds.setdefault("wrong shape", []).append(f"{name} is {list(found)}, expected {wanted}")

    def unsupported(self, text: str) -> None:
        """A tensor whose type or parameters cannot be read."""
        self._kinds.setdefault("unsupported", []).append(text)

    def leftover(self, names: Iterable[str]) -> None:
        """Tensors that the model has no use for: this is another model, or one we would compute wrongly."""
        found = sorted(names)
        if found:
            self._kinds.setdefault("not used by this architecture", []).extend(found)

    def raise_if_any(self) -> None:
        """Raise one CheckpointError with all that was collected."""
        if not self._kinds:
            return
        lines = [f"{self._where}: the tensors do not fit the model that config.json describes"]
        for kind, items in self._kinds.items():
            more = f" and {len(items) - MAX_LISTED} more" if len(items) > MAX_LISTED else ""
            lines.append(f"  {kind} ({len(items)}): {'; '.join(items[:MAX_LISTED])}{more}")
        raise CheckpointError("\n".join(lines))
