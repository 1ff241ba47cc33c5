"""Reading a whole checkpoint, as a model does when it loads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from converters.errors import CheckpointError
from converters.source import Slot, TensorSlot
from tests.converters.folders import open_checked


def read_everything(path: Path, slots: Sequence[Slot]) -> None:
    """Open, check, and read every slot."""
    source = open_checked(path, slots)
    for slot in slots:
        if isinstance(slot, TensorSlot):
            source.read_tensor(slot)
        else:
            source.read_linear(slot)


def outcome(path: Path, slots: Sequence[Slot]) -> str | None:
    """None if everything can be read, else the message of the refusal; any other exception comes through."""
    try:
        read_everything(path, slots)
    except CheckpointError as error:
        return str(error)
    return None
