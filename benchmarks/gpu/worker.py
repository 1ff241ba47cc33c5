"""One measuring part of a GPU check in a process of its own: `python -m benchmarks.gpu.worker SPEC`.

Answers with one JSON line per record on stdout; exits with a message if what it has found is a failure. A process per
part gives each a clean device, and lets one that hangs be ended.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from benchmarks.common import answer, take_stdout

#: Who measures a kind of part. Imported when asked for: matmuls need no transformers, and no model code.
MODULES: Mapping[str, str] = {
    "bandwidth": "benchmarks.gpu.timing",
    "matmul": "benchmarks.gpu.matmul",
    "attention": "benchmarks.gpu.attention",
    "logits": "benchmarks.gpu.logits",
    "end-to-end": "benchmarks.gpu.end_to_end",
    "serving": "benchmarks.gpu.serving",
    "fit": "benchmarks.gpu.fit",
}


def main() -> int:
    """Run the part that the command line names."""
    channel = take_stdout()
    spec = json.loads(sys.argv[1])
    with torch.no_grad():
        for record in find_records(spec):
            answer(channel, record)
    return 0


def find_records(spec: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The records of a part, as they come."""
    found: Iterator[dict[str, Any]] = importlib.import_module(MODULES[spec["kind"]]).records(spec)
    return found


if __name__ == "__main__":
    sys.exit(main())
