"""An emulator of the few PTX instructions that the kernels' assembly uses, on many registers at once.

A register is an int64 array of 32-bit patterns. Floating point is done in float64, where every sum and product of
16-bit floats is exact, and rounded once to nearest even: what `fma.rn` and `sub.rn` promise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

Register = npt.NDArray[np.int64]
_LINE = re.compile(r"^([a-z0-9.]+)\s+(.*)$")
_MASK = 0xFFFFFFFF


def run(assembly: str, inputs: Sequence[Register], num_outputs: int) -> list[Register]:
    """Run a block of assembly: operands $0 .. are the outputs, the inputs follow."""
    registers: dict[str, Register] = {f"${num_outputs + i}": value for i, value in enumerate(inputs)}
    for statement in assembly.strip().strip("{}").split(";"):
        line = " ".join(statement.split())
        if not line or line.startswith(".reg"):
            continue
        match = _LINE.match(line)
        assert match is not None, f"not an instruction: {line!r}"
        destination, *sources = (part.strip() for part in match.group(2).split(","))
        execute = _INSTRUCTIONS[match.group(1)]
        registers[destination] = execute(*(_value(source, registers, inputs[0]) for source in sources)) & _MASK
    return [registers[f"${i}"] for i in range(num_outputs)]


def _value(text: str, registers: Mapping[str, Register], like: Register) -> Register:
    if text in registers:
        return registers[text]
    return np.full_like(like, int(text, 0))


def _lop3(a: Register, b: Register, c: Register, table: Register) -> Register:
    """Every bit is looked up in an 8-bit table by the three bits of the operands."""
    code = int(table.flat[0])
    result = np.zeros_like(a)
    for index in range(8):
        if code >> index & 1:
            picks = [x if index >> shift & 1 else ~x for x, shift in ((a, 2), (b, 1), (c, 0))]
            result |= picks[0] & picks[1] & picks[2]
    return result


def _prmt(a: Register, b: Register, selector: Register) -> Register:
    """Four bytes of the eight in b and a, each by a selector of four bits whose top bit would repeat the sign."""
    both = (b << 32) | a
    result = np.zeros_like(a)
    for place in range(4):
        nibble = (selector >> (4 * place)) & 15
        assert not (nibble & 8).any(), "sign replication is not emulated, and not meant"
        result |= ((both >> (8 * nibble)) & 255) << (8 * place)
    return result


def _halves(dtype: torch.dtype, compute: Callable[..., npt.NDArray[np.float64]]) -> Callable[..., Register]:
    """An instruction on both 16-bit floats of its registers."""

    def execute(*operands: Register) -> Register:
        result = np.zeros_like(operands[0])
        for shift in (0, 16):
            values = [_decode((x >> shift) & 0xFFFF, dtype) for x in operands]
            result |= _encode(compute(*values), dtype) << shift
        return result

    return execute


def _decode(bits: Register, dtype: torch.dtype) -> npt.NDArray[np.float64]:
    return torch.from_numpy(bits.astype(np.uint16).view(np.int16)).view(dtype).double().numpy()


def _encode(values: npt.NDArray[np.float64], dtype: torch.dtype) -> Register:
    rounded = torch.from_numpy(values).to(dtype)
    return rounded.view(torch.int16).numpy().view(np.uint16).astype(np.int64)


_INSTRUCTIONS: Mapping[str, Callable[..., Register]] = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "shr.u32": lambda a, b: a >> b,
    "shl.b32": lambda a, b: a << b,
    "lop3.b32": _lop3,
    "prmt.b32": _prmt,
    "sub.rn.f16x2": _halves(torch.float16, lambda a, b: a - b),
    "fma.rn.f16x2": _halves(torch.float16, lambda a, b, c: a * b + c),
    "fma.rn.bf16x2": _halves(torch.bfloat16, lambda a, b, c: a * b + c),
}


def pair(values: torch.Tensor) -> Register:
    """16-bit floats [n] to registers that hold each twice."""
    bits = values.view(torch.int16).numpy().view(np.uint16).astype(np.int64)
    return bits | bits << 16


def floats(register: Register, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The low and the high 16-bit floats of registers, in float64."""
    low, high = (_decode((register >> shift) & 0xFFFF, dtype) for shift in (0, 16))
    return torch.from_numpy(low), torch.from_numpy(high)
