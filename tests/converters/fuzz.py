"""Mutates sound checkpoints for a while and reads them, in a process of its own that watches its time and memory.

    python -m tests.converters.fuzz safetensors|gguf SECONDS

Prints one line of JSON: how many files were read and refused, the slowest, and how far memory grew over what it was
after the first sound file. Anything but a CheckpointError ends it with a traceback and the file's bytes in hexadecimal.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from converters.source import LinearSlot, Slot, TensorSlot
from tests.converters.folders import MODULE, gptq_config, slot_of, write_folder
from tests.converters.gguf_files import write_gguf
from tests.converters.reading import outcome
from tests.converters.reference import gptq_tensors, random_linear
from tests.converters.test_mutation import EXTREMES, mutate

#: Processor time after which a file is looked at again.
_LONG_S = 0.5
#: More than `test_mutation` has: keys and types of both kinds of header, lengths of all widths.
WORDS = [
    *EXTREMES,
    *(n.to_bytes(4, "little") for n in (0, 1, 8, 9, 13, 2**31, 2**32 - 1)),
    *(
        b'{"',
        b"]",
        b'"data_offsets":',
        b"\\ud800",
        b"\xff\xfe",
        b"[" * 200,
        b"1e999",
        b"-1",
        b"GGUF",
        b"BF16",
        b"F8_E4M3",
    ),
]
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["overwrite", "overwrite", "insert", "delete", "cut"]),
        st.one_of(st.floats(0, 0.1), st.floats(0, 0.5), st.floats(0, 1)),
        st.one_of(st.binary(min_size=1, max_size=12), st.sampled_from(WORDS)),
    ),
    min_size=1,
    max_size=6,
)
ROUND = settings(
    max_examples=500,
    deadline=None,
    database=None,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)


def safetensors(folder: Path) -> tuple[Path, Path, list[Slot]]:
    """What to read, which file to change, and what a model wants of it."""
    linear = random_linear(64, 32, 32)
    tensors = {**gptq_tensors(MODULE, linear), "model.norm.weight": torch.ones(8)}
    write_folder(folder, tensors, gptq_config(group_size=32))
    return folder, folder / "model.safetensors", [slot_of(linear), TensorSlot("model.norm.weight", (8,))]


def gguf(folder: Path) -> tuple[Path, Path, list[Slot]]:
    """The same of a GGUF file with block types, arrays and strings."""
    rng = np.random.default_rng(0)
    q4_0 = np.concatenate(
        [rng.normal(size=(8, 1)).astype("<f2").view(np.uint8), rng.integers(0, 256, (8, 16), dtype=np.uint8)], axis=1
    )
    tensors = {
        "blk.0.ffn_down.weight": (q4_0, GGMLQuantizationType.Q4_0),
        "output_norm.weight": (np.ones(32, np.float32), GGMLQuantizationType.F32),
        "token_embd.weight": (np.ones((4, 32), np.float16), GGMLQuantizationType.F16),
    }
    path = folder / "m.gguf"
    write_gguf(path, tensors, heads=2, kv_heads=1, hidden=32, more={"general.alignment": 32})
    norm, table = TensorSlot("model.norm.weight", (32,)), TensorSlot("model.embed_tokens.weight", (4, 32))
    slots: list[Slot] = [LinearSlot(MODULE, 32, 8), norm, table]
    return path, path, slots


KINDS: dict[str, Callable[[Path], tuple[Path, Path, list[Slot]]]] = {"safetensors": safetensors, "gguf": gguf}


def memory(name: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" at the most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def _timed(path: Path, slots: Sequence[Slot]) -> tuple[str | None, float]:
    """What comes of a file, and the seconds of processor time that it took."""
    started = time.thread_time()
    found = outcome(path, slots)
    return found, time.thread_time() - started


def run(kind: str, seconds: float) -> dict[str, float]:
    """Fuzz until the time is over."""
    counts = {"read": 0, "refused": 0, "slowest_s": 0.0}
    with tempfile.TemporaryDirectory() as name:
        path, file, slots = KINDS[kind](Path(name))
        sound = file.read_bytes()
        assert outcome(path, slots) is None, "the file that is mutated must be sound"
        end = time.monotonic() + seconds

        @given(changes=EDITS)
        @ROUND
        def one(changes: list[tuple[str, float, bytes]]) -> None:
            if time.monotonic() > end:
                return
            content = mutate(sound, changes)
            file.write_bytes(content)
            try:
                found, seconds = _timed(path, slots)
                # Again where it took long: a machine that stands still is charged to whoever ran.
                seconds = min(seconds, _timed(path, slots)[1]) if seconds > _LONG_S else seconds
            except BaseException:
                print(content.hex(), file=sys.stderr)
                raise
            counts["slowest_s"] = max(counts["slowest_s"], seconds)
            counts["read" if found is None else "refused"] += 1

        before = memory("VmRSS")
        number = 0
        while time.monotonic() < end:
            seed(number)(one)()
            number += 1
    return {**counts, "grew_bytes": max(0, memory("VmHWM") - before)}


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], float(sys.argv[2]))))
