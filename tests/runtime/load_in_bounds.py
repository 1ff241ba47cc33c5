"""Loads a folder in a process of its own and says how far its memory grew: `python -m … FOLDER`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch

from qengine.config import LoadConfig
from qengine.runtime.loader import load_decoder, open_model
from quant_kernels.linear.dispatch import Target
from tests.engine.fixtures import path


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (the most so far)."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main(folder: str) -> None:
    target = Target(torch.device("cpu"), torch.bfloat16)
    # What a first load brings for good: libraries, threads, their arenas.
    load_decoder(open_model(LoadConfig(model=path("llama-gptq-sym-g128"))), target, 64)
    opened = open_model(LoadConfig(model=folder))
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    decoder = load_decoder(opened, target, 64)
    peak, after = resident("VmHWM") - before, resident("VmRSS") - before
    print(json.dumps({"peak": peak, "after": after, "weights": decoder.num_bytes}))


if __name__ == "__main__":
    main(sys.argv[1])
