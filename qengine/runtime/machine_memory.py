"""This computer's memory and its cards, as system and driver tell them. Without torch.

Invariant: asking changes nothing: no CUDA context is made, and a computer without a driver has no cards.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

from qengine.errors import ConfigError
from qengine.runtime.planner import Card

#: What the computer's own memory is called in a plan.
CPU = "cpu"
_DRIVERS = ("libcuda.so.1", "libcuda.so")
_NAME_BYTES = 256


def available_memory() -> int:
    """Bytes that can be allocated without swapping: MemAvailable, within the cgroup's limit where there is one."""
    available = _meminfo("MemAvailable")
    try:
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as used:
            return max(0, min(available, int(limit.read()) - int(used.read()) + _cached_files()))
    except (OSError, ValueError):
        return available


def _cached_files() -> int:
    """Bytes of files that the cgroup counts as used, but gives up when memory is asked for."""
    with open("/sys/fs/cgroup/memory.stat") as table:
        return sum(int(line.split()[1]) for line in table if line.startswith("inactive_file "))


def _meminfo(key: str) -> int:
    with open("/proc/meminfo") as table:
        for line in table:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    raise ConfigError(f"/proc/meminfo has no {key}; set kv_cache_memory_bytes")


def driver_cards() -> tuple[Card, ...]:
    """The NVIDIA cards that this process may use, with the memory that their driver shows; none without a driver."""
    driver = next(_libraries(), None)
    if driver is None or driver.cuInit(0):
        return ()
    count = ctypes.c_int(0)
    if driver.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    return tuple(card for index in range(count.value) if (card := _card(driver, index)) is not None)


def _libraries() -> Iterator[ctypes.CDLL]:
    for name in _DRIVERS:
        try:
            yield ctypes.CDLL(name)
        except OSError:
            continue


def _card(driver: ctypes.CDLL, index: int) -> Card | None:
    device, num_bytes, name = ctypes.c_int(0), ctypes.c_size_t(0), ctypes.create_string_buffer(_NAME_BYTES)
    failed = (
        driver.cuDeviceGet(ctypes.byref(device), index)
        or driver.cuDeviceGetName(name, _NAME_BYTES, device)
        or driver.cuDeviceTotalMem_v2(ctypes.byref(num_bytes), device)
    )
    return None if failed else Card(name.value.decode(errors="replace"), num_bytes.value)
