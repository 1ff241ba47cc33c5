"""Card: the few facts about a GPU that choosing a configuration needs, read from the device or looked up by name.

`KNOWN_CARDS` lets plans and tests speak of cards that are not there; its figures are NVIDIA's published ones. What runs
on a real device reads the device.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

KB = 1024


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU.

    Attributes:
        name: as its driver says it.
        arch: compute capability without the dot, e.g. 86.
        num_sms: multiprocessors.
        shared_per_block, shared_per_sm: bytes of shared memory.
        l2_bytes: bytes of the second-level cache.
        is_geforce: whether tensor cores add up in float16 twice as fast as in float32.
        bytes_per_s, clock_hz: memory bandwidth and boost clock as published; 0 if not known, as for a device that was
            asked.
    """

    name: str
    arch: int
    num_sms: int
    shared_per_block: int
    shared_per_sm: int
    l2_bytes: int
    is_geforce: bool = False
    bytes_per_s: float = 0.0
    clock_hz: float = 0.0

    @property
    def issue_slots_per_s(self) -> float:
        """Instructions that all threads together can issue per second: four schedulers a multiprocessor, 32 lanes."""
        return self.num_sms * 4 * 32 * self.clock_hz

    @property
    def slug(self) -> str:
        """The name as a file name, e.g. "nvidia-geforce-rtx-4090"."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


#: Shared memory that one program may use, by compute capability (CUDA C++ Programming Guide, technical specifications).
SHARED_PER_BLOCK: Mapping[int, int] = {80: 163 * KB, 86: 99 * KB, 89: 99 * KB, 90: 227 * KB, 120: 99 * KB}
REGISTERS_PER_SM = 65536


def _card(name: str, arch: int, num_sms: int, l2_mb: int, gb_per_s: int, clock_mhz: int) -> Card:
    per_block = SHARED_PER_BLOCK[arch]
    return Card(
        name=name,
        arch=arch,
        num_sms=num_sms,
        shared_per_block=per_block,
        shared_per_sm=per_block + KB,
        l2_bytes=l2_mb * KB * KB,
        is_geforce="GeForce" in name,
        bytes_per_s=gb_per_s * 1e9,
        clock_hz=clock_mhz * 1e6,
    )


#: Multiprocessors, L2, bandwidth and boost clock from NVIDIA's architecture white papers and data sheets.
KNOWN_CARDS: Mapping[str, Card] = {
    "3090": _card("NVIDIA GeForce RTX 3090", 86, 82, 6, 936, 1695),
    "4090": _card("NVIDIA GeForce RTX 4090", 89, 128, 72, 1008, 2520),
    "5090": _card("NVIDIA GeForce RTX 5090", 120, 170, 96, 1792, 2407),
    "a100": _card("NVIDIA A100-SXM4-80GB", 80, 108, 40, 2039, 1410),
    "h100": _card("NVIDIA H100 80GB HBM3", 90, 132, 50, 3350, 1755),
}


def card_of(device: torch.device) -> Card:
    """The facts of a CUDA device, as it reports them."""
    facts = torch.cuda.get_device_properties(device)
    arch = facts.major * 10 + facts.minor
    return Card(
        name=facts.name,
        arch=arch,
        num_sms=facts.multi_processor_count,
        shared_per_block=getattr(facts, "shared_memory_per_block_optin", SHARED_PER_BLOCK.get(arch, 99 * KB)),
        shared_per_sm=facts.shared_memory_per_multiprocessor,
        l2_bytes=facts.L2_cache_size,
        is_geforce="GeForce" in facts.name,
    )
