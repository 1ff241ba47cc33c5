"""Opens checkpoints one after the other and tells what each took, in a process of its own.

    python -m tests.converters.spending < list of paths as JSON

Prints a line of JSON for each: seconds of processor time, bytes by which memory grew at the most over what it was
before, and the message of the refusal, or "read". The tokenizer that GGUF metadata describe is made too.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path

from converters.errors import CheckpointError
from converters.gguf_tokenizer import read_tokenizer
from converters.open import open_checkpoint


def memory(name: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" at the most."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def forget_the_peak() -> None:
    """Give back what is free, and let "VmHWM" begin anew."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def open_whole(path: str) -> str:
    """What comes of it."""
    try:
        source = open_checkpoint(path)
        metadata = getattr(source, "metadata", {})
        if "tokenizer.ggml.model" in metadata:
            read_tokenizer(metadata)
    except CheckpointError as error:
        return str(error)
    return "read"


def main() -> None:
    for path in json.load(sys.stdin):
        forget_the_peak()
        before, started = memory("VmRSS"), time.process_time()
        said = open_whole(path)
        seconds = time.process_time() - started
        print(json.dumps([seconds, memory("VmHWM") - before, said]), flush=True)


if __name__ == "__main__":
    main()
