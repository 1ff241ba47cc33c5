"""The parts of a GPU check, each well under eight minutes, and what is known of those that have run.

A part's record is a JSON file in the state folder, written whole when the part ends; so a check that is cut off goes
on where it was. A record counts only for the sources, the card and the versions that made it. Later kinds of checks
(attention, end to end, memory) are further entries of `PARTS`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import REPOSITORY, write_text
from benchmarks.gpu.problems import Workload

#: A part that takes longer is ended, and failed.
PART_SECONDS = 470
_SOURCES = ("quant_kernels", "benchmarks/gpu", "tests/quant_kernels")


@dataclass(frozen=True, slots=True)
class Part:
    """One step of the check.

    Attributes:
        name: of its record.
        kind: "tests" runs pytest, "bandwidth" and "matmul" measure.
        seconds: about how long it takes on a fast card; a part is not begun if less is left.
        arguments: for pytest.
        workload: for "matmul".
    """

    name: str
    kind: str
    seconds: int
    arguments: tuple[str, ...] = ()
    workload: Workload | None = field(default=None)


def _matmul(shapes: str, dtype: str, group: int = 128, zero: str = "const", seconds: int = 150) -> Part:
    name = f"matmul-{shapes}-{dtype}-g{group}" + ("" if zero == "const" else f"-{zero}")
    return Part(name, "matmul", seconds, workload=Workload(shapes, dtype, group, zero))


_KERNEL_TESTS = "tests/quant_kernels"
_REAL = f"{_KERNEL_TESTS}/test_gpu.py"
PARTS: tuple[Part, ...] = (
    Part(
        "tests-kernels",
        "tests",
        150,
        tuple(f"{_KERNEL_TESTS}/{name}.py" for name in ("test_p16_matmul", "test_p16_prepared", "test_elementwise")),
    ),
    Part("tests-real-sizes", "tests", 200, (_REAL, "-m", "gpu and not every_tile")),
    Part("tests-every-tile-float16", "tests", 300, (_REAL, "-m", "every_tile", "-k", "every_tile and float16")),
    Part("tests-every-tile-bfloat16", "tests", 300, (_REAL, "-m", "every_tile", "-k", "every_tile and bfloat16")),
    Part("bandwidth", "bandwidth", 15),
    _matmul("8b", "float16"),
    _matmul("8b", "bfloat16"),
    _matmul("square", "float16", seconds=60),
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
