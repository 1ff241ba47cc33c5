"""Figures of variants that this machine has compiled before, on disk outside the repository.

`keys` says what a figure answers for. Invariant: a damaged or unwritable cache costs time, never correctness.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from quant_kernels.compiled.keys import VARIANT_DIGITS, counting_key, variant_key
from quant_kernels.compiled.variants import AnyVariant

#: Files of other compilers or counters that are kept.
_KEPT = 4


class FigureCache:
    """Figures by variant. `save` writes what `put` added."""

    def __init__(self, folder: Path, compiler: str) -> None:
        self.path = folder / f"{counting_key(compiler)}.json"
        self._figures: dict[str, dict[str, Any]] = _read(self.path)

    def get(self, variant: AnyVariant) -> dict[str, Any] | None:
        """What was measured, or None."""
        return self._figures.get(variant_key(variant))

    def put(self, variant: AnyVariant, found: dict[str, Any]) -> None:
        """Remember what was measured."""
        self._figures[variant_key(variant)] = found

    def save(self) -> None:
        """Write the file whole, and drop the oldest of the others."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, suffix=".part", delete=False) as part:
                json.dump(self._figures, part)
            Path(part.name).replace(self.path)
            files = sorted(self.path.parent.glob("*.json"), key=lambda p: p.stat().st_mtime)
            for old in files[:-_KEPT]:
                old.unlink(missing_ok=True)
        except OSError:
            return


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(record, dict):
        return {}
    return {key: figures for key, figures in record.items() if len(key) == VARIANT_DIGITS}
