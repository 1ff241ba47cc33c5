"""Running out of memory in a step, told apart from every other failure.

Invariant: what leaves `memory_guard` for lack of memory is `StepMemoryError`, whichever allocator ran out, and by then
the tensors of the step that failed are free: a traceback would keep them as long as the exception lives.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qengine.errors import StepMemoryError

#: How torch's allocator for CPU memory says so, by a RuntimeError like any other.
_CPU_ALLOCATOR = "DefaultCPUAllocator"


@contextmanager
def memory_guard(device: torch.device) -> Iterator[None]:
    """Around a step on `device`.

    Raises:
        StepMemoryError: instead of what the allocators raise.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # What is free in small pieces may be had again as a whole.
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise StepMemoryError(reason) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory could not be had."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _CPU_ALLOCATOR in str(error)
