"""Compiles a kernel for a GPU architecture that need not be there, and reads what came out.

Triton's compiler and the assembler and disassembler in its wheel do all the work; no driver and no device is touched.
Invariant: the kernel is compiled as a launch would compile it, with the same constants, alignment and options.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_WARP = 32
#: Launches promise the compiler that pointers, strides and most sizes are multiples of 16.
_ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel for one architecture. `spill_bytes` counts stack and local memory per thread."""

    shared_bytes: int
    registers: int
    spill_bytes: int
    sass: str


def cross_compile(
    kernel: Any, arch: int, types: Mapping[str, str], constants: Mapping[str, Any], options: Mapping[str, Any]
) -> Compiled:
    """Compile for compute capability `arch`, e.g. 86.

    Args:
        kernel: a function under `triton.jit`.
        types: of every argument that is no constant, in Triton's spelling, e.g. "*fp16", "i32".
        constants: values of all constexpr arguments.
        options: as a launch would pass them: num_warps, num_stages, ...
    """
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    unspecialized = {name for name in (kernel.do_not_specialize or ()) if isinstance(name, str)}
    attributes = {
        (index,): _ALIGNED
        for index, name in enumerate(kernel.arg_names)
        if signature[name] not in ("constexpr", "fp32") and name not in unspecialized
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(constants), attrs=attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, _WARP), options=dict(options))
    text = _disassemble(binary.asm["cubin"])
    usage = _USAGE.search(text)
    if usage is None:
        raise RuntimeError(f"cuobjdump did not say what {kernel.__name__} uses; its output began: {text[:200]}")
    registers, stack, _, local = (int(value) for value in usage.groups())
    return Compiled(binary.metadata.shared, registers, stack + local, text)


def _disassemble(cubin: bytes) -> str:
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
