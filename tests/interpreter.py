"""Triton's interpreter in a quarter of the time, for tests.

It patches the language anew for every call of a device function, looks for integer overflow in every sum, and makes for
every result of an operation its shape, its type and a table of all types. The first is needed once per launch, and what
is to be patched stays the same; the second is left where kernels are tested, not where whole models run on them; the
others are made once and kept. Where a triton looks otherwise inside, nothing is changed.
"""

from __future__ import annotations

import inspect
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
    """Patch the language once per launch, and keep what is made of shapes and types."""
    if _is_known:
        _Patches(interpreter).install()
    if _is_known and hasattr(interpreter, "_patch_builtin") and hasattr(interpreter, "_patch_attr"):
        interpreter._patch_builtin = _kept_members(interpreter._patch_attr)
    if _is_known and hasattr(interpreter, "_get_np_dtype"):
        interpreter._get_np_dtype = _kept_dtypes(interpreter._get_np_dtype)
    if _is_known and _made_of(tl.block_type(tl.int32, [2])) == {"element_ty", "shape", "numel", "name"}:
        tl.block_type.__init__ = _kept_types(tl.block_type.__init__)
    if _is_known and _made_of(tl.tensor(None, tl.int32)) == {"handle", "shape", "numel", "type", "dtype"}:
        tl.tensor.__init__ = _kept_shapes(tl.tensor.__init__)


def check_overflow(is_wanted: bool) -> None:
    """Whether sums of integers are checked from now on."""
    if _is_known and interpreter.interpreter_builder.options.sanitize_overflow != is_wanted:
        options = interpreter.interpreter_builder.options
        interpreter.interpreter_builder.options = replace(options, sanitize_overflow=is_wanted)


def _made_of(value: Any) -> set[str]:
    return set(vars(value))


def _kept_members(patch: Callable[..., None]) -> Callable[[Any, Any, Any], None]:
    """Patches what a module or class of the language had of builtins when it was first asked for."""
    kept: dict[Any, list[tuple[str, Any]]] = {}

    def patch_builtin(owner: Any, builder: Any, scope: Any) -> None:
        if owner not in kept:
            kept[owner] = [pair for pair in inspect.getmembers(owner) if tl.core.is_builtin(pair[1])]
        for name, member in kept[owner]:
            patch(owner, name, member, builder, scope)

    return patch_builtin


def _kept_dtypes(real: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """NumPy's type of a type, by its name."""
    kept: dict[str, Any] = {}

    def np_dtype(type_: Any) -> Any:
        found = kept.get(type_.name)
        if found is None:
            found = kept[type_.name] = real(type_)
        return found

    return np_dtype


def _kept_types(real: Callable[[Any, Any, Any], None]) -> Callable[[Any, Any, Any], None]:
    """`block_type.__init__` with the shape, number of elements and name that the first of its like got."""
    kept: dict[Any, tuple[Any, Any, Any]] = {}

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = [getattr(size, "value", size) for size in shape]
        key = (element_ty.name, *sizes)
        # What is no int, though equal to one, is for triton to refuse.
        found = kept.get(key) if all(type(size) is int for size in sizes) else None
        if found is None:
            real(self, element_ty, shape)
            kept[key] = (self.shape, self.numel, self.name)
        else:
            self.element_ty = element_ty
            self.shape, self.numel, self.name = found

    return init


def _kept_shapes(real: Callable[[Any, Any, Any], None]) -> Callable[[Any, Any, Any], None]:
    """`tensor.__init__` with the shape and number of elements that the first of its type got."""
    kept: dict[str, tuple[Any, Any]] = {}

    def init(self: Any, handle: Any, type: Any) -> None:
        found = kept.get(type.name)
        if found is None:
            real(self, handle, type)
            kept[type.name] = (self.shape, self.numel)
        else:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = found

    return init


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
