"""What the machine can do at best: memory read bandwidth and matrix-multiply rate, measured with torch.

    python -m benchmarks.probe measure '{"threads": 8}'

The bounds that other figures are held against. Each is the best of several passes: a bound is what was reached once.
Runs as a worker process, because torch and a large buffer would otherwise count in the parent's memory.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

import torch

from benchmarks.common import BenchmarkError, answer, run_worker
from benchmarks.machine import last_level_cache_bytes

#: A buffer this many times the last-level cache is read from memory, not from the cache.
CACHE_MULTIPLE = 8
MIN_BUFFER_BYTES = 256 * 2**20
_PASSES = 20
_MATMUL_SIZE = 2048
_PATIENCE_SECONDS = 10.0


def buffer_bytes(cache_bytes: int | None, free_bytes: int) -> int:
    """Size of the buffer to read: several times the cache, at most a quarter of free memory, whole float32 pages."""
    wanted = max(MIN_BUFFER_BYTES, CACHE_MULTIPLE * (cache_bytes or 0))
    return max(4096, min(wanted, free_bytes // 4) // 4096 * 4096)


def read_bandwidth(num_bytes: int, passes: int = _PASSES) -> float:
    """Bytes per second of reading a float32 buffer from end to end with all of torch's threads."""
    buffer = torch.ones(num_bytes // 4)
    # Which reduction is fastest differs between machines; each reads every byte once and cannot stop early.
    readers: list[Callable[[], torch.Tensor]] = [
        lambda: torch.sum(buffer),
        lambda: torch.dot(buffer, buffer),
        lambda: torch.linalg.vector_norm(buffer),
        lambda: torch.sum(buffer.view(torch.int64)),
    ]
    return num_bytes / min(_best_seconds(reader, passes) for reader in readers)


def matmul_rate(dtype: torch.dtype, size: int = _MATMUL_SIZE, passes: int = 5) -> float:
    """Floating-point operations per second of a square matmul, 2 per multiply-add."""
    a = torch.randn(size, size).to(dtype)
    b = torch.randn(size, size).to(dtype)
    return 2 * size**3 / _best_seconds(lambda: a @ b, passes)


def _best_seconds(run: Callable[[], Any], passes: int) -> float:
    """The first pass warms up, or is all: torch's loops in a type that the processor lacks take minutes."""
    started = time.perf_counter()
    run()
    best = time.perf_counter() - started
    for _ in range(passes):
        begin = time.perf_counter()
        if begin - started > _PATIENCE_SECONDS:
            break
        run()
        best = min(best, time.perf_counter() - begin)
    return best


def _measure(spec: Mapping[str, Any], channel: TextIO) -> None:
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    num_bytes = buffer_bytes(last_level_cache_bytes(), free_bytes)
    rates = {str(dtype).removeprefix("torch."): matmul_rate(dtype) for dtype in (torch.bfloat16, torch.float32)}
    record = {
        "read_bytes_per_s": read_bandwidth(num_bytes),
        "read_buffer_bytes": num_bytes,
        "matmul_flop_per_s": rates,
        "threads": spec["threads"],
    }
    answer(channel, record)


if __name__ == "__main__":
    sys.exit(run_worker({"measure": _measure}, BenchmarkError))
