"""Figures of variants that have been compiled before, on disk outside the repository.

Keyed by the text of every source file that a kernel is made of, by the compiler's version, and by the variant; so it
never answers for other code. Invariant: a damaged or unwritable cache costs time, never correctness.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from quant_kernels.compiled.variants import Variant

_PACKAGE = Path(__file__).resolve().parent.parent
#: What decides about machine code and about how it is counted.
_SOURCES = ("linear/p16", "elementwise", "compiled", "tuning/tile.py")
#: Files of earlier sources that are kept.
_KEPT = 4


class FigureCache:
    """Figures by variant for the present sources. `save` writes what `put` added."""

    def __init__(self, folder: Path, compiler: str) -> None:
        self.path = folder / f"{_fingerprint(compiler)}.json"
        self._figures: dict[str, dict[str, Any]] = _read(self.path)

    def get(self, variant: Variant) -> dict[str, Any] | None:
        return self._figures.get(_key(variant))

    def put(self, variant: Variant, figures: dict[str, Any]) -> None:
        self._figures[_key(variant)] = figures

    def save(self) -> None:
        """Write the file whole, and drop those of older sources."""
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


def _key(variant: Variant) -> str:
    return f"{variant!r}"


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _fingerprint(compiler: str) -> str:
    digest = hashlib.sha256(compiler.encode())
    for name in _SOURCES:
        place = _PACKAGE / name
        for file in sorted(place.glob("*.py")) if place.is_dir() else [place]:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:20]
