"""Buffers: used again when the last view is gone, and not before."""

from __future__ import annotations

import gc
from collections.abc import Callable

import numpy as np
import pytest
import torch

from converters.buffers import Buffers
from converters.files import Bytes

SIZE = 2**21


def address(data: Bytes) -> int:
    return int(data.__array_interface__["data"][0])


def test_a_dropped_buffer_is_used_again() -> None:
    pool = Buffers()
    data = pool.take(SIZE)
    first = address(data)
    del data
    gc.collect()
    assert pool.free_bytes == SIZE
    assert address(pool.take(SIZE)) == first


@pytest.mark.parametrize(
    "view",
    [
        lambda data: data[5:].reshape(-1)[3:],
        lambda data: data.view(np.int32)[::2],
        lambda data: torch.from_numpy(data).view(torch.int32).reshape(-1, 8)[3:5],
        lambda data: torch.from_numpy(data[8:]),
        lambda data: data.data[10:],
    ],
)
def test_a_view_of_a_view_keeps_the_memory(view: Callable[[Bytes], object]) -> None:
    pool = Buffers()
    data = pool.take(SIZE)
    first, kept = address(data), view(data)
    del data
    gc.collect()
    assert pool.free_bytes == 0
    other = pool.take(SIZE)
    assert address(other) != first
    del kept
    gc.collect()
    assert pool.free_bytes == SIZE


def test_sizes_do_not_mix_and_small_ones_are_not_kept() -> None:
    pool = Buffers()
    for num_bytes in (SIZE, SIZE + 1, 100, 0):
        assert len(pool.take(num_bytes)) == num_bytes
    gc.collect()
    assert pool.free_bytes == 2 * SIZE + 1


def test_what_waits_can_be_given_back() -> None:
    pool = Buffers()
    held = [pool.take(SIZE) for _ in range(3)]
    late = pool.take(SIZE)
    del held
    gc.collect()
    pool.trim(2 * SIZE)
    assert pool.free_bytes == 2 * SIZE
    pool.clear()
    late[:] = 7
    del late
    gc.collect()
    assert pool.free_bytes == 0
