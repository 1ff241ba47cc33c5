"""Figures of variants that have been compiled before, on disk outside the repository.

Keyed by all that decides about machine code: the source of the kernel and of everything it calls, types, constants,
options, architecture and the compiler's version; and by the code that counts. So it never answers for another kernel,
and an edit elsewhere costs nothing. Invariant: a damaged or unwritable cache costs time, never
correctness.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import tempfile
from pathlib import Path
from typing import Any

import triton.language as tl
from triton.runtime.jit import KernelInterface

from quant_kernels.compiled import cross_compile, figures, sass
from quant_kernels.compiled.variants import AnyVariant

#: Files of other compilers or counters that are kept.
_KEPT = 4


class FigureCache:
    """Figures by variant. `save` writes what `put` added."""

    def __init__(self, folder: Path, compiler: str) -> None:
        self.path = folder / f"{_fingerprint(compiler)}.json"
        self._figures: dict[str, dict[str, Any]] = _read(self.path)
        self._keys: dict[AnyVariant, str] = {}

    def get(self, variant: AnyVariant) -> dict[str, Any] | None:
        """What was measured, or None."""
        return self._figures.get(self._key(variant))

    def put(self, variant: AnyVariant, found: dict[str, Any]) -> None:
        """Remember what was measured."""
        self._figures[self._key(variant)] = found

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

    def _key(self, variant: AnyVariant) -> str:
        if variant not in self._keys:
            kernel, types, constants, options = variant.arguments()
            parts = (source_of(kernel), variant.arch, variant.weights_per_thread, types, constants, options)
            self._keys[variant] = hashlib.sha256(repr(parts).encode()).hexdigest()[:24]
        return self._keys[variant]


def source_of(kernel: Any, seen: frozenset[str] = frozenset()) -> str:
    """The text of a kernel, of those it calls and of the constants they use; Triton's own key has line numbers."""
    function = kernel.fn
    text = [getattr(kernel, "src", None) or inspect.getsource(function)]
    for name in sorted(set(function.__code__.co_names) - seen):
        value = function.__globals__.get(name)
        if isinstance(value, KernelInterface):
            text.append(source_of(value, seen | {name}))
        elif isinstance(value, tl.constexpr):
            text.append(f"{name} = {value.value!r}")
    return "\n".join(text)


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _fingerprint(compiler: str) -> str:
    digest = hashlib.sha256(compiler.encode())
    for module in (cross_compile, figures, sass):
        assert module.__file__ is not None, "our own modules are files"
        digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest()[:20]
