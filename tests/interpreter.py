"""Triton's interpreter in a third of the time, for tests.

It patches the language anew for every call of a device function, and looks for integer overflow in every sum. The first
is needed once per launch; the second stays where kernels are tested, not where whole models run on them. Where a triton
looks otherwise inside, nothing is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

try:
    import triton.language as tl
    from triton.runtime import interpreter
except ImportError:  # The system has no triton: its tests are skipped.
    interpreter = None

_NEEDED = ("_patch_lang", "_LangPatchScope", "interpreter_builder")
_is_known = interpreter is not None and all(hasattr(interpreter, name) for name in _NEEDED)


def quicken() -> None:
    """Patch the language once per launch."""
    if _is_known:
        _Patches(interpreter).install()


def check_overflow(is_wanted: bool) -> None:
    """Whether sums of integers are checked from now on."""
    if _is_known and interpreter.interpreter_builder.options.sanitize_overflow != is_wanted:
        options = interpreter.interpreter_builder.options
        interpreter.interpreter_builder.options = replace(options, sanitize_overflow=is_wanted)


class _Patches:
    """What is patched at the moment; the end of a launch takes it back."""

    def __init__(self, interpreter: Any) -> None:
        self._interpreter = interpreter
        self._patch: Callable[[Any], Any] = interpreter._patch_lang
        self._restore: Callable[[Any], None] = interpreter._LangPatchScope.restore
        self._modules: dict[Any, frozenset[str]] = {}
        self._patched: set[str] = set()

    def install(self) -> None:
        self._interpreter._patch_lang = self.patch
        self._interpreter._LangPatchScope.restore = lambda scope: self.restore(scope)

    def patch(self, function: Any) -> Any:
        modules = self._modules.get(function)
        if modules is None:
            names = {id(tl): "language", id(tl.core): "core"}
            found = (names.get(id(value)) for value in function.__globals__.values())
            modules = self._modules[function] = frozenset(name for name in found if name)
        if modules <= self._patched:
            return self._interpreter._LangPatchScope()
        self._patched |= modules
        return self._patch(function)

    def restore(self, scope: Any) -> None:
        self._restore(scope)
        self._patched.clear()
