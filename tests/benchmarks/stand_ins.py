"""Stand-ins for llama.cpp's binaries: each writes down its arguments and prints a fixed answer."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.engines.llama_cpp import BINARIES

BENCH_ANSWER = json.dumps([{"n_prompt": 512, "avg_ts": 320.5, "model_size": 96_000}])
BATCHED_ANSWER = "\n".join(json.dumps({"pl": batch, "speed_tg": speed}) for batch, speed in ((1, 130.5), (16, 226.0)))


def write_binaries(folder: Path) -> Path:
    """Write the three into the folder, which is made; returns it."""
    folder.mkdir()
    for name, answer in zip(BINARIES, (BENCH_ANSWER, BATCHED_ANSWER, "Paris"), strict=True):
        (folder / f"{name}.answer").write_text(answer)
        script = f'#!/bin/sh\necho "$@" > "{folder}/{name}.arguments"\ncat "{folder}/{name}.answer"\n'
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    return folder
