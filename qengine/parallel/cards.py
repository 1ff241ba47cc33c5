"""Which cards the ranks have, by names that stay the same over restarts: what a verdict on them is kept under.

It asks the driver for names only and allocates nothing on a card.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from qengine.parallel.verdicts import Cards

_DRIVER_FILE = Path("/proc/driver/nvidia/version")
_VERSION = re.compile(r"\b\d{3}\.\d+(?:\.\d+)?\b")


def identify_cards(devices: Sequence[str]) -> Cards:
    """The cards of all ranks ["cuda:0", ...], the driver, and torch's NCCL."""
    indices = [torch.device(name).index or 0 for name in devices]
    uuids = tuple(str(torch.cuda.get_device_properties(i).uuid) for i in indices)
    return Cards(uuids, driver_version(), nccl_version())


def nccl_version() -> str:
    """Such as "2.27.3", or "none" where torch was built without."""
    if not torch.distributed.is_nccl_available():
        return "none"
    return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]


def driver_version(file: Path = _DRIVER_FILE) -> str:
    """Such as "550.54.15", or "unknown" where the driver does not say."""
    try:
        found = _VERSION.search(file.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return "unknown"
    return found[0] if found else "unknown"
