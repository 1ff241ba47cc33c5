"""Reading NVIDIA machine code (SASS): instructions, loops and what is in them.

Works on the text that `cuobjdump -sass` prints. A loop is a backward branch and everything between its target and it.
Invariant: an instruction is counted once per loop that holds it, under its opcode without modifiers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
_ADDRESS = re.compile(r"0x([0-9a-f]+)")
#: Opcodes of the tensor cores, by which the main loop is known.
_TENSOR_OPCODES = ("HMMA", "HGMMA", "QGMMA")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: its byte address, its opcode without modifiers, and its operands as text."""

    address: int
    opcode: str
    operands: str


@dataclass(frozen=True, slots=True)
class Loop:
    """A loop's instructions by opcode."""

    counts: Counter[str]

    @property
    def num_instructions(self) -> int:
        return self.counts.total()

    @property
    def num_tensor(self) -> int:
        """Tensor-core instructions."""
        return sum(self.counts[name] for name in _TENSOR_OPCODES)

    def count(self, prefix: str) -> int:
        """Instructions whose opcode begins with `prefix`: "I2F" counts I2FP too."""
        return sum(n for opcode, n in self.counts.items() if opcode.startswith(prefix))


def instructions(sass: str) -> Iterator[Instruction]:
    """Every instruction in the text, in order. NOP is padding and is left out."""
    for match in _INSTRUCTION.finditer(sass):
        opcode = match.group(2).partition(".")[0]
        if opcode != "NOP":
            yield Instruction(int(match.group(1), 16), opcode, match.group(3))


def loops(sass: str) -> list[Loop]:
    """Every loop in the text."""
    code = list(instructions(sass))
    found = []
    for branch in code:
        target = _ADDRESS.search(branch.operands) if branch.opcode == "BRA" else None
        if target is not None and int(target.group(1), 16) < branch.address:
            first = int(target.group(1), 16)
            found.append(Loop(Counter(i.opcode for i in code if first <= i.address <= branch.address)))
    return found


def main_loop(sass: str) -> Loop | None:
    """The loop with the most tensor-core instructions; None where no loop has any."""
    candidates = [loop for loop in loops(sass) if loop.num_tensor]
    return max(candidates, key=lambda loop: loop.num_tensor, default=None)


def whole(sass: str) -> Loop:
    """The text as if it were one loop, for kernels without one."""
    return Loop(Counter(i.opcode for i in instructions(sass)))
