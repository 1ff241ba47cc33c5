"""The parts of a GPU check, each well under eight minutes, and what is known of those that have run.

A part's record is a JSON file in the state folder, written whole when the part ends; so a check that is cut off goes
on where it was. A record counts only for the sources, the card and the versions that made it.

Parts come in the order of what they are worth: is it right, then the figures that models are judged by, then details.
What is early fits three calls of eight minutes. Seconds are estimates for an H100 whose kernels are not compiled yet:
no part has run on a GPU.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks.common import REPOSITORY, write_text
from benchmarks.gpu.problems import Workload
from benchmarks.gpu.workloads import Attention, EndToEnd, Fit, Logits, Serving

#: A part that takes longer is ended, and failed.
PART_SECONDS = 470
_SOURCES = ("quant_kernels", "qengine", "converters", "benchmarks/gpu", "tests/quant_kernels", "tests/runtime")


class Measured(Protocol):
    """What a part measures, as its worker is told."""

    def to_json(self) -> dict[str, Any]:
        """Values that JSON has."""
        ...


@dataclass(frozen=True, slots=True)
class Part:
    """One step of the check.

    Attributes:
        name: of its record.
        kind: "tests" runs pytest; what others measure is in `worker.MODULES`.
        seconds: about how long it takes on a fast card; a part is not begun if less is left.
        runs: arguments of each pytest; they run side by side, since compiling is most of their time.
        workload: for what measures.
    """

    name: str
    kind: str
    seconds: int
    runs: tuple[tuple[str, ...], ...] = ()
    workload: Measured | None = None


def _matmul(shapes: str, dtype: str, group: int = 128, zero: str = "const", seconds: int = 150) -> Part:
    name = f"matmul-{shapes}-{dtype}-g{group}" + ("" if zero == "const" else f"-{zero}")
    return Part(name, "matmul", seconds, workload=Workload(shapes, dtype, group, zero))


_KERNEL_TESTS = "tests/quant_kernels"
_REAL = f"{_KERNEL_TESTS}/test_gpu.py"
_ATTENTION = f"{_KERNEL_TESTS}/test_gpu_attention.py"
_SMALL = ("p16_matmul", "p16_prepared", "elementwise", "kv_format", "kv_words", "rope_store", "sampling", "paged")
_SAMPLER = "tests/runtime/test_sampler.py"
#: Names of tests that share out the attention tests about evenly; the last takes what the others leave.
_ATTENTION_SHARES = (
    "head_and_block_sizes and not float16",
    "head_and_block_sizes and float16",
    "long_contexts or windows",
    "store_at_real_sizes",
    "not head_and_block_sizes and not long_contexts and not windows and not store_at_real_sizes",
)
PARTS: tuple[Part, ...] = (
    Part("tests-kernels", "tests", 110, tuple((f"{_KERNEL_TESTS}/test_{name}.py",) for name in _SMALL)),
    Part("tests-attention", "tests", 110, tuple((_ATTENTION, "-k", share) for share in _ATTENTION_SHARES)),
    Part("tests-engine", "tests", 100, (("tests/runtime/test_gpu_runner.py",), (_SAMPLER, "-m", "gpu"))),
    Part("attention", "attention", 100, workload=Attention()),
    Part("end-to-end-8b", "end-to-end", 150, workload=EndToEnd("llama-3-8b", variants=("graphs", "eager", "KV int8"))),
    Part("logits", "logits", 110, workload=Logits()),
    Part(
        "end-to-end-8b-16-bit",
        "end-to-end",
        60,
        workload=EndToEnd("llama-3-8b", quantization=None, variants=("graphs",), batches=(1, 32)),
    ),
    Part("serving", "serving", 140, workload=Serving("llama-3-8b")),
    _matmul("8b", "float16"),
    Part("end-to-end-7b", "end-to-end", 110, workload=EndToEnd("llama-2-7b")),
    Part("end-to-end-13b", "end-to-end", 130, workload=EndToEnd("llama-2-13b")),
    Part("fit-70b-two-ranks", "fit", 240, workload=Fit("llama-3-70b", ranks=2, sequences=8, tokens=2048)),
    Part("fit-7b", "fit", 90, workload=Fit("llama-2-7b")),
    Part("fit-13b", "fit", 110, workload=Fit("llama-2-13b")),
    Part("tests-real-sizes", "tests", 200, ((_REAL, "-m", "gpu and not every_tile"),)),
    Part("bandwidth", "bandwidth", 15),
    _matmul("8b", "bfloat16"),
    _matmul("square", "float16", seconds=60),
    Part("tests-every-tile-float16", "tests", 300, ((_REAL, "-m", "every_tile", "-k", "every_tile and float16"),)),
    Part("tests-every-tile-bfloat16", "tests", 300, ((_REAL, "-m", "every_tile", "-k", "every_tile and bfloat16"),)),
    _matmul("70b", "float16", seconds=240),
    _matmul("70b", "bfloat16", seconds=240),
    _matmul("8b", "float16", zero="integer"),
    _matmul("8b", "float16", group=64),
    _matmul("8b", "bfloat16", group=32, zero="integer"),
)


def fingerprint() -> str:
    """A name for the sources that figures depend on."""
    digest = hashlib.sha256()
    for folder in _SOURCES:
        for path in sorted((REPOSITORY / folder).rglob("*")):
            if path.suffix in (".py", ".json") and path.name != "budgets.json":
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Origin:
    """What a record must have been made with to count: sources, card, versions, and at least these peers."""

    sources: str
    card: str
    versions: str
    peers: frozenset[str] = frozenset()


class State:
    """Records of finished parts, in a folder."""

    def __init__(self, folder: Path, origin: Origin) -> None:
        self._folder = folder
        self._origin = origin

    def record_of(self, part: Part) -> dict[str, Any] | None:
        """What a part found, if its record counts."""
        try:
            record = json.loads(self._path(part).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(record, dict) or any(record.get(k) != v for k, v in self._facts().items()):
            return None
        lacks_peers = part.kind == "matmul" and not self._origin.peers <= set(record.get("peers", ()))
        return None if lacks_peers else record

    def save(self, part: Part, record: dict[str, Any]) -> None:
        """Remember what a part found."""
        peers = sorted(self._origin.peers)
        whole = {**record, "part": part.name, "kind": part.kind, **self._facts(), "peers": peers}
        write_text(self._path(part), json.dumps(whole, indent=1) + "\n")

    def pending(self, parts: Sequence[Part]) -> list[Part]:
        """Parts that have not run, then those whose last run failed: one that always fails holds nobody up."""
        records = {p: self.record_of(p) for p in parts}
        failed = [p for p, r in records.items() if r is not None and r["status"] != "ok"]
        return [p for p, r in records.items() if r is None] + failed

    def _facts(self) -> dict[str, str]:
        origin = self._origin
        return {"sources": origin.sources, "card": origin.card, "versions": origin.versions}

    def _path(self, part: Part) -> Path:
        return self._folder / f"{part.name}.json"
