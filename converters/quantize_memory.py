"""What a quantization takes of memory: predicted before it begins, measured while it runs.

The prediction is the largest of the moments that a run goes through: a layer in float32 with the activations of one
batch and the moments of its inputs; the same layer with what is needed to choose the codes of its largest linear; the
tables; a file that is being written. Invariant: nothing in it grows with the number of layers or samples. Disk is a sum
of files that will be written.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from converters.layers import GROUPS
from converters.skeleton import Skeleton, layer_name
from converters.source import LinearSlot, Slot, TensorSlot

_FLOAT = 4
#: What the system's status calls resident memory, and the most that there was of it.
_NOW, _PEAK = "VmRSS", "VmHWM"
#: float32 matrices [N, K] that a method has of a linear while it chooses its codes, the weight itself not counted:
#: rounding has scales, zero points and codes for each weight, and two steps of a sum; a search has a weight that is
#: scaled and its error besides; coordinate descent has the error and its gradient.
_COPIES = {"rtn": 5, "awq": 6, "gptq": 7, "auto": 7}
#: float32 matrices [K, K] of a Hessian: while it is factorized, and afterwards.
_FACTORIZING, _FACTORIZED = 3, 2
#: Searches factors with the moments of all groups of a layer in memory; and pushes errors on with a factorized Hessian.
_SMOOTH, _FEEDBACK = ("awq", "auto"), ("gptq", "auto")
#: Bytes of a weight in a file, with its share of scales.
_PACKED = 0.55
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
    skeleton: Skeleton,
    linears: Sequence[LinearSlot],
    batches: Sequence[tuple[int, int]],
    *,
    method: str,
    tied: bool,
    on_gpu: bool,
) -> MemoryPlan:
    """What quantizing will take.

    Args:
        linears: that are quantized.
        batches: sequences and tokens of each batch of calibration; empty if there is none.
        tied: the head is the embedding, and not written.
    """
    layers = [sum(map(_numbers, skeleton.layer(index))) for index in range(skeleton.num_layers)]
    rest = [*skeleton.before(), *skeleton.after(tied=tied)]
    working = _FLOAT * (max(layers) + _beside(skeleton, linears, batches, method))
    shard = min(max(4 * max(layers), _LEAST_SHARD_BYTES), _MOST_SHARD_BYTES)
    # A table is read, and cast; a linear is read as a record, expanded and turned.
    table = 2 * _FLOAT * max(map(_numbers, rest))
    reading = 3 * _FLOAT * max(map(_numbers, skeleton.layer(0)))
    weights = int(2 * sum(map(_numbers, rest)) + _PACKED * sum(layers))
    writing = table + min(shard, weights)
    host = _resident(_NOW) + max(writing, reading if on_gpu else max(working, _FLOAT * max(layers) + reading))
    # Of one layer and of the next.
    states = 2 * sum(count * length for count, length in batches) * skeleton.config.hidden_size * _FLOAT
    return MemoryPlan(host, working if on_gpu else 0, 2 * weights + states, shard)


def _beside(skeleton: Skeleton, linears: Sequence[LinearSlot], batches: Sequence[tuple[int, int]], method: str) -> int:
    """Numbers that are in memory beside a layer, at the worst moment."""
    largest = max(linears, key=_numbers)
    copies = _COPIES[method] * _numbers(largest)
    if not batches:
        return copies
    config = skeleton.config
    inputs = {slot.name: slot.in_features for slot in skeleton.layer(0) if isinstance(slot, LinearSlot)}
    squares = [inputs[f"{layer_name(0)}.{names[0]}"] ** 2 for names, _ in GROUPS]
    kept = sum(squares) if method in _SMOOTH else max(squares)
    # Of the residual stream and of what every linear of a layer is fed, and the gate, its activation and the product.
    tokens = max(count * length for count, length in batches)
    activations: int = tokens * (6 * config.hidden_size + 3 * config.intermediate_size)
    moments = [kept + activations]
    if method in _SMOOTH:
        moments.append(kept + copies)
    if method in _FEEDBACK:
        square = max(slot.in_features for slot in linears) ** 2
        moments += [_FACTORIZING * square, _FACTORIZED * square + copies]
    return max(moments)


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


def give_memory_back() -> None:
    """Have the C library return what is free to the system.

    It keeps freed pieces of up to 32 MB, and the tensors of one layer leave holes that the next one's do not fit into.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


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
