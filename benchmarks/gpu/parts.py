"""The parts of a GPU check, each well under eight minutes, and what is known of those that have run.

A part's record is a JSON file in the state folder, written whole when the part ends; so a check that is cut off goes
on where it was. A record counts only for the sources and the card that made it. Later kinds of checks (attention,
end to end, memory) are further entries of `PARTS`.
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
PARTS: tuple[Part, ...] = (
    Part(
        "tests-kernels",
        "tests",
        150,
        tuple(f"{_KERNEL_TESTS}/{name}.py" for name in ("test_p16_matmul", "test_p16_prepared", "test_elementwise")),
    ),
    Part("tests-real-sizes", "tests", 200, (f"{_KERNEL_TESTS}/test_gpu.py", "-m", "gpu and not every_tile")),
    Part("tests-every-tile", "tests", 300, (f"{_KERNEL_TESTS}/test_gpu.py", "-m", "gpu and every_tile")),
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


class State:
    """Records of finished parts, in a folder."""

    def __init__(self, folder: Path, sources: str, card: str) -> None:
        self._folder = folder
        self._sources = sources
        self._card = card

    def record_of(self, part: Part) -> dict[str, Any] | None:
        """What a part found, if it has run for these sources on this card."""
        try:
            record = json.loads(self._path(part).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        valid = isinstance(record, dict) and record.get("sources") == self._sources and record.get("card") == self._card
        return record if valid else None

    def save(self, part: Part, record: dict[str, Any]) -> None:
        """Remember what a part found."""
        whole = {**record, "part": part.name, "kind": part.kind, "sources": self._sources, "card": self._card}
        write_text(self._path(part), json.dumps(whole, indent=1) + "\n")

    def pending(self, parts: Sequence[Part]) -> list[Part]:
        """Parts without a record, or whose last run failed."""
        return [p for p in parts if (record := self.record_of(p)) is None or record["status"] != "ok"]

    def _path(self, part: Part) -> Path:
        return self._folder / f"{part.name}.json"
