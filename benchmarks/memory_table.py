"""The tables of docs/memory.md: what fits where, as `qengine plan` says.

    python -m benchmarks.memory_table                   # print them
    python -m benchmarks.memory_table docs/memory.md    # put them between the markers of a file

Invariant: every figure is one of a plan that the command gives for the flags that are named; nothing is measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.models import MODELS
from qengine.commands.parsing import parse
from qengine.commands.plan import as_json, plan_model
from qengine.commands.settings import plan_settings

BEGIN, END = "<!-- made by python -m benchmarks.memory_table -->", "<!-- end -->"
_GIB = 2**30
#: Flags for a cache of 16, 8 and 8 bits a number; the last two have a scale per token and head.
CACHES = (("16-bit KV", "auto"), ("fp8 KV", "fp8"), ("int8 KV", "int8"))
#: What leaves more of a card to the cache, where few sequences run.
LEAN = ("--max-num-seqs", "16", "--max-num-batched-tokens", "512", "--gpu-memory-utilization", "0.97")


@dataclass(frozen=True, slots=True)
class Row:
    """A model, by its folder in benchmarks/models, on some cards."""

    model: str
    cards: str

    def argv(self, cache: str, more: Sequence[str] = ()) -> list[str]:
        """The flags of `qengine plan`: 4 bits, groups of 128 with zero points, as AWQ has them."""
        where = [str(MODELS / self.model), "--load-format", "dummy", "-q", "awq", "--group-size", "128"]
        return [*where, "--gpu", self.cards, "--kv-cache-dtype", cache, *more]

    def plan(self, cache: str, more: Sequence[str] = ()) -> dict[str, Any]:
        """What `--json` prints."""
        return as_json(plan_model(plan_settings(parse("plan", self.argv(cache, more)))))


ROWS = (
    *(Row(m, "24GB") for m in ("llama-2-7b", "llama-2-13b", "llama-3-8b", "qwen2.5-14b", "qwen2.5-32b")),
    *(Row(m, "24GB,24GB") for m in ("llama-3-70b", "qwen2.5-72b")),
    Row("llama-2-7b", "8GB"),
)


def tables() -> str:
    """Markdown: what a card holds, then the context, as it is by default and lean."""
    parts = [
        _table(("model", "cards", *_PURPOSES, "KV per token"), [_bytes_row(row) for row in ROWS]),
        "Context in tokens, and the tokens that the whole cache holds:",
        _context_table(()),
        f"The same with `{' '.join(LEAN)}`:",
        _context_table(LEAN),
    ]
    return "\n\n".join(parts)


_PURPOSES = ("weights", "step buffers", "graphs", "reserve", "KV cache")
_NAMES = ("weight_bytes", "step_buffer_bytes", "graph_bytes", "reserve_bytes", "kv_bytes")


def _bytes_row(row: Row) -> list[str]:
    plan = row.plan("auto")
    first = max(plan["cards"], key=lambda card: card["weight_bytes"])
    sizes = [f"{first[name] / _GIB:.2f}" for name in _NAMES]
    return [row.model, _cards(row), *sizes, f"{first['kv_bytes_per_token'] / 1024:.1f} KiB"]


def _context_table(more: Sequence[str]) -> str:
    rows = [[row.model, _cards(row), *(_context(row.plan(cache, more)) for _, cache in CACHES)] for row in ROWS]
    return _table(("model", "cards", *(name for name, _ in CACHES)), rows)


def _context(plan: dict[str, Any]) -> str:
    if not plan["fits"]:
        return "does not fit"
    return f"{plan['max_model_len']} of {plan['cards'][0]['num_blocks'] * plan['block_size']}"


def _cards(row: Row) -> str:
    sizes = row.cards.split(",")
    return f"{len(sizes)} x {sizes[0]}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    marks = ["---", "---", *["---:"] * (len(header) - 2)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, marks, *rows))


def put_into(text: str) -> str:
    """A document with the tables between its markers.

    Raises:
        ValueError: if it has none.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"expected the lines '{BEGIN}' and '{END}'")
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables, or put them into a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("file", nargs="?", type=Path, help="document with the markers")
    given = parser.parse_args(argv)
    if given.file is None:
        print(tables())
    else:
        given.file.write_text(put_into(given.file.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
