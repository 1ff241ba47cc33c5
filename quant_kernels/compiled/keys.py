"""What a figure answers for: the keys of variants, of the compiler, and of the code that counts.

A variant's key covers all that decides about its machine code but the compiler: the source of the kernel and of
everything it calls, types, constants, options and architecture. `counting_key` covers the rest: the compiler's version
and the code that compiles and counts. Invariant: figures with both keys equal are of the same machine code, so an edit
elsewhere costs nothing and none is ever used for another kernel. Variables that put another assembler into the compiler
(TRITON_PTXAS_PATH and the like) are not looked at.
"""

from __future__ import annotations

import hashlib
import inspect
from functools import cache
from pathlib import Path
from typing import Any

import triton.language as tl
from triton.runtime.jit import KernelInterface

from quant_kernels.compiled import cross_compile, figures, sass
from quant_kernels.compiled.variants import AnyVariant

VARIANT_DIGITS = 16
_SAID_TO_JIT = ("do_not_specialize", "do_not_specialize_on_alignment", "noinline", "debug")
_COUNTING_DIGITS = 20


@cache
def variant_key(variant: AnyVariant) -> str:
    """What decides about a variant's machine code, the compiler aside."""
    kernel, types, constants, options = variant.arguments()
    parts = (source_of(kernel), variant.arch, variant.weights_per_thread, types, constants, options)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:VARIANT_DIGITS]


def counting_key(compiler: str) -> str:
    """The compiler, and our own code that calls it and counts."""
    digest = hashlib.sha256(compiler.encode())
    for module in (cross_compile, figures, sass):
        assert module.__file__ is not None, "our own modules are files"
        digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest()[:_COUNTING_DIGITS]


def source_of(kernel: Any, seen: frozenset[Any] = frozenset()) -> str:
    """The text of a kernel, of those it calls and of the constants they use; Triton's own key has line numbers.

    What is said to `triton.jit` counts too, as its text begins after that.
    """
    function = kernel.fn
    said = [getattr(kernel, name, None) for name in _SAID_TO_JIT]
    text = [repr(said), getattr(kernel, "src", None) or inspect.getsource(function)]
    seen |= {function}
    for name in sorted(function.__code__.co_names):
        value = function.__globals__.get(name)
        if isinstance(value, KernelInterface):
            if value.fn not in seen:
                text.append(source_of(value, seen))
        elif isinstance(value, tl.constexpr):
            text.append(f"{name} = {value.value!r}")
    return "\n".join(text)
