"""The device that a part measures, as parts see it: its platforms, its bandwidth, its memory, and time in its kernels.

Tests put a CPU with interpreted kernels in its place (`Machine` with other values), so that every line of the parts
runs without a GPU. Nothing here measures a model.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType

from benchmarks.gpu.engine import MakePlatform
from benchmarks.gpu.timing import copy_bandwidth
from qengine.runtime.platform import Platform


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a part runs.

    Attributes:
        make_platform: the platform, for eager steps or for recorded ones.
        copy_bytes_per_s: what a large copy reads and writes.
        dtype: of activations.
    """

    device: torch.device
    make_platform: MakePlatform
    copy_bytes_per_s: float
    dtype: torch.dtype

    @classmethod
    def cuda(cls, dtype: torch.dtype) -> Machine:
        """The GPU. Measures its bandwidth first, before memory is taken."""
        device = torch.device("cuda", torch.cuda.current_device())
        bandwidth = copy_bandwidth()
        torch.cuda.empty_cache()

        def make_platform(enforce_eager: bool) -> Platform:
            return Platform.of(device, dtype, enforce_eager=enforce_eager)

        return cls(device, make_platform, bandwidth, dtype)


def free_memory(device: torch.device, *, uncap: bool = False) -> None:
    """Give back what nobody holds any more; `uncap` ends the limit on the process, for peers that know none."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        if uncap:
            torch.cuda.set_per_process_memory_fraction(1.0, device)


def memory_record(device: torch.device) -> dict[str, int | None]:
    """Bytes: the most that torch had reserved and handed out, and what the card has in use now, the driver's too."""
    if device.type != "cuda":
        return {"peak_reserved": None, "peak_allocated": None, "card_used": None}
    free, total = torch.cuda.mem_get_info(device)
    return {
        "peak_reserved": torch.cuda.max_memory_reserved(device),
        "peak_allocated": torch.cuda.max_memory_allocated(device),
        "card_used": total - free,
    }


def kernel_seconds(work: Callable[[], object], device: torch.device) -> float | None:
    """Seconds that the device spends in kernels and copies while `work` runs; None where no profiler can tell."""
    if device.type != "cuda":
        work()
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    on_device = [e for e in profile.events() or () if e.device_type == DeviceType.CUDA]
    return sum(e.time_range.elapsed_us() for e in on_device) * 1e-6 or None
