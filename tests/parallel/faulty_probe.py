"""The peer probe with cards that fail as real ones do: `python -m tests.parallel.faulty_probe FAULT SPEC`.

It runs on the CPU, with gloo in NCCL's place; all else is the probe itself. A fault that ends in "-directly" goes away
when NCCL is told not to copy from card to card.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import torch

from qengine import environment
from qengine.parallel.peer_probe import DevicePath, Spec, run


class FaultyPath(DevicePath):
    """Cards with one fault, or "none"."""

    def __init__(self, spec: Spec, fault: str) -> None:
        super().__init__(spec)
        direct_only = fault.endswith("-directly")
        self._fault = "none" if direct_only and environment.nccl_p2p_disabled() else fault.removesuffix("-directly")

    def copy(self, x: torch.Tensor, source: int, target: int) -> torch.Tensor:
        arrived = super().copy(x, source, target)
        if self._fault == "zeros":
            arrived.zero_()
        elif self._fault == "nothing-copied":
            arrived = ~x
        elif self._fault == "flips-one-way" and source > target:
            arrived[len(arrived) // 2] ^= 4
        elif self._fault == "right-if-small" and len(x) > 2**20:
            arrived[2**20 :] = 0
        elif self._fault == "stalls-in-copy":
            time.sleep(600)
        elif self._fault == "out-of-memory" and self.rank == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16.00 MiB")
        elif self._fault == "segfaults":
            os.kill(os.getpid(), signal.SIGSEGV)
        return arrived

    def connect(self) -> None:
        if self._fault == "one-never-connects" and self.rank == 1:
            time.sleep(600)
        if self._fault == "raises" and self.rank == 0:
            raise RuntimeError("NCCL error: unhandled system error")
        super().connect()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        total = super().all_reduce(x)
        if self._fault == "sums-miss-a-card" and len(x) > 1:
            return x
        if self._fault == "killed-in-sums" and self.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return total


def main() -> None:
    fault, spec_text = sys.argv[1:]
    if fault == "never-starts":
        raise ImportError("libcudart.so is missing")
    if fault == "noisy":
        print("NCCL version 2.21.5+cuda12.4\n[1]\n", flush=True)
    spec = Spec.from_text(spec_text)
    torch.set_num_threads(1)
    run(FaultyPath(spec, fault), spec)
    os._exit(0)


if __name__ == "__main__":
    main()
