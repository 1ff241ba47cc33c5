"""What a card has, and how this process is held to its part of it.

The planner works with these figures; nothing else asks the device. Invariant: what is reported as free can be taken by
this process, what torch holds already included.
"""

from __future__ import annotations

import torch

from qengine.runtime.planner import CONTEXT_BYTES, Card


def card_of(device: torch.device) -> Card:
    """The card as it is now; torch gives back what it holds and does not need."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return Card(torch.cuda.get_device_name(device), total, free + torch.cuda.memory_reserved(device))


def cap_process(allowed: int, device: torch.device) -> None:
    """Make torch fail rather than take more than is allowed beside the driver, so that a smaller card can be tried on a
    larger one. Holds for the whole process until it is set anew."""
    total = torch.cuda.mem_get_info(device)[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(1, allowed - CONTEXT_BYTES) / total), device)
