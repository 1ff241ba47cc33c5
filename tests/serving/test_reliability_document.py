"""docs/reliability.md says what is so: its limits are those of the table in the code, its tests exist."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from qengine.serving.limits import LIMITS

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def test_the_limits_are_those_in_force() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", DOCUMENT, re.MULTILINE)
    documented = {name: float(value) for name, value in rows}
    assert len(documented) == len(rows)
    assert documented == {name: float(value) for name, value in dataclasses.asdict(LIMITS).items()}


def test_the_tests_it_names_are_there() -> None:
    named = set(re.findall(r"tests/[\w/]+\.py", DOCUMENT))
    assert len(named) > 10
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
