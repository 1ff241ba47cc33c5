"""What a quantization takes of memory: predicted before it begins, measured while it runs.

The prediction adds up what is in memory at the same time at the worst moment: a layer in float32, what a quantizer
needs beside it for its largest linear, the activations of one batch. Invariant: nothing in it grows with the number of
layers or samples. Disk is a sum of files that will be written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from converters.skeleton import Skeleton
from converters.source import LinearSlot, Slot, TensorSlot

_FLOAT = 4
#: What the system's status calls resident memory, and the most that there was of it.
_NOW, _PEAK = "VmRSS", "VmHWM"
#: float32 matrices [K, K] and [N, K] that a method has beside the layer itself, for one group of linears.
_SQUARES = {"rtn": 0.0, "awq": 1.0, "gptq": 3.0, "auto": 4.0}
_COPIES = {"rtn": 5.0, "awq": 6.0, "gptq": 4.0, "auto": 6.0}
#: Shards are collected in memory: as much as two layers, within these bounds.
_LEAST_SHARD_BYTES, _MOST_SHARD_BYTES = 256 * 2**20, 4 * 2**30


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes.

    Attributes:
        host: of the process at its peak.
        device: that torch has allocated on a GPU at the peak; 0 on the CPU.
        disk: of the output and of what lies beside it meanwhile.
        shard: of one output file.
    """

    host: int
    device: int
    disk: int
    shard: int


def plan_memory(
    skeleton: Skeleton, linears: Sequence[LinearSlot], batches: Sequence[tuple[int, int]], *, method: str, on_gpu: bool
) -> MemoryPlan:
    """What quantizing will take.

    Args:
        linears: that are quantized.
        batches: sequences and tokens of each batch of calibration; empty if there is none.
    """
    layers = [sum(map(_numbers, skeleton.layer(index))) for index in range(skeleton.num_layers)]
    layer, rest = max(layers), [*skeleton.before(), *skeleton.after(tied=False)]
    config = skeleton.config
    largest = max((_SQUARES[method] * s.in_features**2 + _COPIES[method] * _numbers(s)) for s in linears)
    tokens = max((count * length for count, length in batches), default=0)
    width, inner = config.hidden_size, config.intermediate_size
    activations = tokens * (6 * width + 4 * inner) * _FLOAT
    working = int(_FLOAT * (layer + largest) + activations)
    shard = min(max(4 * layer, _LEAST_SHARD_BYTES), _MOST_SHARD_BYTES)
    table = max(map(_numbers, rest))
    weights = 2 * sum(map(_numbers, rest)) + sum(layers)
    # A record is read, expanded and copied; the tables are cast; shards are collected while nothing else is there.
    reading = int(3 * _FLOAT * max(map(_numbers, skeleton.layer(0))))
    writing = 2 * _FLOAT * table + min(shard, weights)
    host = _resident(_NOW) + max(writing, 2 * _FLOAT * table, reading if on_gpu else working + reading)
    hidden = 4 * sum(count * length for count, length in batches) * width * _FLOAT
    return MemoryPlan(host, working if on_gpu else 0, 2 * weights + hidden, shard)


class PeakMemory:
    """The most that was used since it was made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @property
    def host(self) -> int:
        """Bytes of the process in memory, 0 where the system does not say."""
        return _resident(_PEAK)

    @property
    def on_device(self) -> int:
        """Bytes that torch allocated on a GPU; 0 on the CPU."""
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else 0


def _resident(key: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == key:
                return int(value.split()[0]) * 1024
    return 0


def _numbers(slot: Slot) -> int:
    if isinstance(slot, TensorSlot):
        return torch.Size(slot.shape).numel()
    return slot.in_features * slot.out_features
