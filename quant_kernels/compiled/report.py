"""What a compiled variant costs, held against what its card has and what it was allowed: one row, and its verdict.

Budgets are instructions per weight in the main loop, in a committed table (`budgets.json`) with one row per
configuration and one column per architecture. They were made with one version of the compiler, and hold with some air
for others. Invariant: a variant without a budget is a failure, so that nothing becomes selectable unseen. Nothing is
compiled here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quant_kernels.compiled.variants import AnyVariant, row_name
from quant_kernels.scheme import ZeroKind
from quant_kernels.tuning.card import SHARED_PER_BLOCK, Card

BUDGETS = Path(__file__).with_name("budgets.json")
#: LOP3 per 4-bit weight: one makes two weights, and a step has a few of its own.
MAX_LOP3 = 0.55
#: PRMT and I2F per weight: what is done per group and column stays below it, what is done per weight does not.
MAX_MOVES = 0.15
#: What another version of the compiler may take on top.
OTHER_COMPILER = 1.15


@dataclass(frozen=True, slots=True)
class Budgets:
    """Instructions per weight by configuration and architecture, and the compiler's version they were made with."""

    compiler: str
    rows: Mapping[str, Mapping[str, float]]

    def find(self, variant: AnyVariant, compiler: str) -> float | None:
        """The budget of a variant for a compiler."""
        budget = self.rows.get(row_name(variant), {}).get(str(variant.arch))
        if budget is None or compiler == self.compiler:
            return budget
        return round(budget * OTHER_COMPILER, 2)


@dataclass(frozen=True, slots=True)
class Resources:
    """One row of the table. Bytes of shared memory per program, of spills per thread; the rest per weight."""

    kernel: str
    config: str
    arch: int
    shared_bytes: int
    shared_limit: int
    registers: int
    spill_bytes: int
    instr_per_weight: float | None
    budget: float | None
    lop3_per_weight: float | None
    prmt_per_weight: float | None
    i2f_per_weight: float | None
    ok: bool
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "problems": list(self.problems)}


def judge(variant: AnyVariant, figures: Mapping[str, Any], budgets: Budgets, compiler: str) -> Resources:
    """The row of a variant that `compiler` made, with everything that is wrong with it."""
    limit = SHARED_PER_BLOCK[variant.arch]
    budget = budgets.find(variant, compiler)
    problems = []
    if figures["shared_bytes"] > limit:
        problems.append(f"needs {figures['shared_bytes']} bytes of shared memory, sm_{variant.arch} has {limit}")
    if figures["spill_bytes"]:
        problems.append(f"spills {figures['spill_bytes']} bytes of registers per thread")
    if variant.weights_per_thread:
        problems += _loop_problems(variant, figures, budget)
    return Resources(
        kernel=variant.kernel,
        config=variant.config,
        arch=variant.arch,
        shared_bytes=figures["shared_bytes"],
        shared_limit=limit,
        registers=figures["registers"],
        spill_bytes=figures["spill_bytes"],
        instr_per_weight=_rounded(figures.get("instr_per_weight")),
        budget=budget,
        lop3_per_weight=_rounded(figures.get("lop3_per_weight")),
        prmt_per_weight=_rounded(figures.get("prmt_per_weight")),
        i2f_per_weight=_rounded(figures.get("i2f_per_weight")),
        ok=not problems,
        problems=tuple(problems),
    )


def _loop_problems(variant: AnyVariant, figures: Mapping[str, Any], budget: float | None) -> list[str]:
    instr = figures.get("instr_per_weight")
    if instr is None:
        return ["has no loop on the tensor cores"]
    problems = []
    if budget is None:
        problems.append("has no budget; look at it, then run with --new-budgets")
    elif instr > budget:
        problems.append(f"takes {instr:.2f} instructions per weight, the budget is {budget:.2f}")
    scheme = variant.scheme
    if scheme is not None and variant.tile is not None and scheme.bits == 4 and scheme.zero != ZeroKind.CODEBOOK:
        if figures["lop3_per_weight"] > MAX_LOP3:
            problems.append(f"takes {figures['lop3_per_weight']:.2f} LOP3 per weight, at most {MAX_LOP3} are needed")
        for name in ("prmt", "i2f"):
            if figures[f"{name}_per_weight"] > MAX_MOVES:
                problems.append(f"has {figures[f'{name}_per_weight']:.2f} {name.upper()} per weight in its main loop")
    return problems


def read_budgets(path: Path = BUDGETS) -> Budgets:
    """The table of budgets; empty where there is none yet.

    Raises:
        ValueError: if the file is no such table.
    """
    if not path.is_file():
        return Budgets("", {})
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return Budgets(record["compiler"], record["budgets"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no table of budgets ({error!r}); take the committed one") from error


def lowered_budgets(
    budgets: Budgets, measured: Iterable[tuple[AnyVariant, Mapping[str, Any]]], compiler: str, *, add_new: bool
) -> Budgets:
    """The budgets with every row lowered to what was measured, where that is less; rows of nothing measured go.

    Args:
        compiler: the version that measured.
        add_new: give variants without a budget one.
    """
    table: dict[str, dict[str, float]] = {}
    for variant, figures in measured:
        if "instr_per_weight" not in figures:
            continue
        key, arch = row_name(variant), str(variant.arch)
        old = budgets.rows.get(key, {}).get(arch)
        new = math.ceil(figures["instr_per_weight"] * 100) / 100
        if old is not None or add_new:
            table.setdefault(key, {})[arch] = new if old is None else min(old, new)
    return Budgets(compiler, table)


def budgets_text(budgets: Budgets) -> str:
    """The table as JSON, one configuration a line."""
    rows = [f"  {json.dumps(key)}: {json.dumps(budgets.rows[key])}" for key in sorted(budgets.rows)]
    head = f'{{\n "compiler": {json.dumps(budgets.compiler)},\n "budgets": {{\n'
    return head + ",\n".join(rows) + "\n }\n}\n"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def issue_share(card: Card, row: Resources, group_size: int = 128) -> float:
    """The part of a card's issue slots that decoding takes at full memory bandwidth: below 1, memory is the limit.

    A computation from published figures, not a measurement: bandwidth over bytes per weight (4 bits and its share of a
    16-bit scale) times instructions per weight, over the instructions that the card can issue.
    """
    assert row.instr_per_weight is not None, "asked for kernels that read weights"
    return share_of_slots(card, row.instr_per_weight, 0.5 + 2 / group_size)


def share_of_slots(card: Card, instr_per_weight: float, bytes_per_weight: float) -> float:
    """`issue_share` by its figures; the card's bandwidth and clock must be known."""
    return card.bytes_per_s / bytes_per_weight * instr_per_weight / card.issue_slots_per_s
