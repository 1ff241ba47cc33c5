"""One measuring part of a GPU check in a process of its own: `python -m benchmarks.gpu.worker SPEC`.

Answers with one JSON line per record on stdout. A process per part gives each a clean device, and lets one that hangs
be ended.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import answer, take_stdout
from benchmarks.gpu.contenders import CUDA, contenders
from benchmarks.gpu.matmul import measure
from benchmarks.gpu.problems import Workload
from benchmarks.gpu.timing import copy_bandwidth
from quant_kernels.tuning.select import Selector


def main() -> int:
    """Run the part that the command line names."""
    channel = take_stdout()
    for record in _records(json.loads(sys.argv[1])):
        answer(channel, record)
    return 0


def _records(spec: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    torch.set_grad_enabled(False)
    if spec["kind"] == "bandwidth":
        yield {"copy_bytes_per_s": copy_bandwidth()}
        return
    selector = Selector.of(CUDA)
    everyone = contenders(selector, _path(spec.get("gemlite")), _path(spec.get("marlin")))
    yield from measure(Workload.from_json(spec["workload"]), selector, everyone)


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


if __name__ == "__main__":
    sys.exit(main())
