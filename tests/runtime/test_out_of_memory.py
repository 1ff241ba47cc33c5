"""What counts as running out of memory, and that nothing of the step that failed is kept."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from qengine.errors import StepMemoryError
from qengine.runtime.out_of_memory import memory_guard

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nand more"), "Tried to allocate"),
        (MemoryError(), "MemoryError"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
            "can't allocate",
        ),
    ],
)
def test_every_allocator_is_understood(error: Exception, reason: str) -> None:
    with pytest.raises(StepMemoryError, match=reason) as caught, memory_guard(CPU):
        raise error
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("an illegal memory access"), ValueError("x"), KeyboardInterrupt()])
def test_everything_else_is_what_it_is(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, memory_guard(CPU):
        raise error
    assert caught.value is error


def test_torchs_own_words_on_this_machine() -> None:
    with pytest.raises(StepMemoryError), memory_guard(CPU):
        torch.empty(2**60, dtype=torch.uint8)


def test_tensors_of_the_failed_step_are_free_while_the_error_is_handled() -> None:
    kept: list[weakref.ref[torch.Tensor]] = []

    def step() -> None:
        hidden = torch.ones(1000)
        kept.append(weakref.ref(hidden))
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(StepMemoryError), memory_guard(CPU):
        step()
    gc.collect()
    assert kept[0]() is None
