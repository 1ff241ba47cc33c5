"""A rank of `benchmarks.gpu.fit` on the CPU, kernels interpreted: `python -m tests.benchmarks.tiny_rank DTYPE SPEC`."""

from __future__ import annotations

import json
import sys

import torch

from benchmarks.common import answer, take_stdout
from benchmarks.gpu import fit_rank
from qengine.process_end import exit_now
from tests.benchmarks.tiny import machine


def main() -> int:
    channel = take_stdout()
    dtype, spec = getattr(torch, sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    with torch.no_grad():
        answer(channel, fit_rank.run(spec, machine(dtype)))
    return 0


if __name__ == "__main__":
    exit_now(main())
