"""The committed record of every variant's figures (`record.json`), so that a new machine need not compile them all.

One row per configuration, one entry per architecture: the variant's key, then its figures. So the diff of a change to a
kernel shows what it did to registers and instructions everywhere. Invariant: an entry answers only for the key it was
made with (`keys`), so what has changed is never taken from here, nor with another compiler. Whether entries are true is
for `resources` to check, which compiles some that a machine has not compiled yet. Nothing is compiled here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant_kernels.compiled.keys import counting_key, variant_key
from quant_kernels.compiled.variants import AnyVariant, row_name

RECORD = Path(__file__).with_name("record.json")
#: The figures of an entry, in order; variants that read no weights have the first three.
COLUMNS = (
    *("shared_bytes", "registers", "spill_bytes"),
    *("instr_per_weight", "lop3_per_weight", "prmt_per_weight", "i2f_per_weight"),
)
_ALWAYS = 3
Row = Mapping[str, list[Any]]


@dataclass(frozen=True, slots=True)
class Record:
    """Entries by configuration and architecture, and the compiler's version that made them."""

    compiler: str
    rows: Mapping[str, Row]

    def find(self, variant: AnyVariant) -> dict[str, Any] | None:
        """The figures of a variant; None if there are none for what it is today."""
        entry = self.rows.get(row_name(variant), {}).get(str(variant.arch))
        if entry is None or entry[0] != variant_key(variant):
            return None
        return dict(zip(COLUMNS, entry[1:], strict=False))

    def difference(self, variant: AnyVariant, compiled: Mapping[str, Any]) -> str:
        """What a variant's entry has otherwise than a compilation, in words; "" if nothing, or without an entry."""
        found = self.find(variant)
        if found is None or found == compiled:
            return ""
        names = [name for name in COLUMNS if found.get(name) != compiled.get(name)]
        said = ", ".join(f"{name} {found.get(name)}, compiled {compiled.get(name)}" for name in names)
        return f"sm_{variant.arch} {row_name(variant)} has {said}"


def read_record(compiler: str, path: Path = RECORD) -> Record:
    """The record for `compiler`: without rows if another one or other counting code made it, or none is there.

    Raises:
        ValueError: if the file is no such record.
    """
    if not path.is_file():
        return Record("", {})
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        record = Record(read["compiler"], read["figures"])
        is_current = read["counting"] == counting_key(compiler)
        sound = all(_is_entry(entry) for row in record.rows.values() for entry in row.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no record of figures ({error!r}); take the committed one") from error
    if not sound:
        raise ValueError(f"{path} has an entry that is no key with {len(COLUMNS)} figures; take the committed one")
    return record if is_current else Record(record.compiler, {})


def make_record(measured: Iterable[tuple[AnyVariant, Mapping[str, Any]]], compiler: str) -> Record:
    """The record of what `compiler` made."""
    rows: dict[str, dict[str, list[Any]]] = {}
    for variant, figures in measured:
        assert set(figures) <= set(COLUMNS), "a figure that has no column would be lost"
        values = [figures[name] for name in COLUMNS if name in figures]
        rows.setdefault(row_name(variant), {})[str(variant.arch)] = [variant_key(variant), *values]
    return Record(compiler, rows)


def record_text(record: Record) -> str:
    """The record as JSON, one configuration a line."""
    rows = [f"  {json.dumps(name)}: {json.dumps(record.rows[name])}" for name in sorted(record.rows)]
    head = {"compiler": record.compiler, "counting": counting_key(record.compiler), "columns": ["key", *COLUMNS]}
    lines = "".join(f" {json.dumps(name)}: {json.dumps(value)},\n" for name, value in head.items())
    return "{\n" + lines + ' "figures": {\n' + ",\n".join(rows) + "\n }\n}\n"


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, list) or len(entry) not in (1 + _ALWAYS, 1 + len(COLUMNS)):
        return False
    return isinstance(entry[0], str) and all(type(value) in (int, float) for value in entry[1:])
