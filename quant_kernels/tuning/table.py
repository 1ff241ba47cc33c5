"""Tuning tables: measured choices for one GPU, as JSON beside this module.

    {"card": "NVIDIA H100 80GB HBM3", "arch": 90, "command": "make tune", "environment": {...},
     "choices": [{"kernel": "matmul", "bits": 4, "dtype": "float16", "group_size": 128, "zero": "const",
                  "in_features": 4096, "out_features": 6144, "rows": 16, "tile": {...}, "split_k": 4, ...}]}

`rows` is the upper end of a regime; a tile of null means that expanding the weight was faster. Files are written by
`benchmarks.tune`, read once when an engine starts, and reviewed like code. Invariant: a file that does not mean what
this version means is an error that names the entry, never a silent fallback. No file for a card is no error.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant_kernels.scheme import Scheme
from quant_kernels.tuning.card import Card
from quant_kernels.tuning.tile import Tile

FOLDER = Path(__file__).parent
_KERNELS = ("matmul", "gate_up")


@dataclass(frozen=True, slots=True)
class TunedKey:
    """What an entry was measured on; `group_size` 0 is one group for all of K."""

    kernel: str
    bits: int
    dtype: str
    group_size: int
    zero: str
    in_features: int
    out_features: int
    rows: int

    @classmethod
    def of(cls, kernel: str, scheme: Scheme, in_features: int, out_features: int, rows: int) -> TunedKey:
        dtype = str(scheme.dtype).removeprefix("torch.")
        zero = scheme.zero.name.lower()
        return cls(kernel, scheme.bits, dtype, scheme.group_size, zero, in_features, out_features, rows)


@dataclass(frozen=True, slots=True)
class TunedChoice:
    """The fastest of what was tried. `tile` None: not this kernel (for a matmul: expand the weight)."""

    kernel: str
    tile: Tile | None
    split_k: int


@dataclass(frozen=True, slots=True)
class TuningTable:
    """All measured choices of a card; empty for a card that nobody has measured."""

    card: str
    arch: int
    choices: Mapping[TunedKey, TunedChoice]

    @classmethod
    def empty(cls, card: Card) -> TuningTable:
        return cls(card.name, card.arch, {})

    def find(self, kernel: str, scheme: Scheme, in_features: int, out_features: int, rows: int) -> TunedChoice | None:
        """The measured choice for exactly this problem's regime."""
        if not self.choices:
            return None
        return self.choices.get(TunedKey.of(kernel, scheme, in_features, out_features, rows))

    def tiles(self) -> Iterable[tuple[TunedKey, Tile]]:
        """Every tile that the table can select, with what it was measured on."""
        return ((key, choice.tile) for key, choice in self.choices.items() if choice.tile is not None)


def table_path(card: Card, folder: Path = FOLDER) -> Path:
    """Where a card's table is, if there is one."""
    return folder / f"{card.slug}.json"


def load_table(card: Card, folder: Path = FOLDER) -> TuningTable:
    """The table of a card, or an empty one.

    Raises:
        ValueError: if the file is damaged or does not fit this version.
    """
    path = table_path(card, folder)
    return read_table(path) if path.is_file() else TuningTable.empty(card)


def read_table(path: Path) -> TuningTable:
    """The table in a file.

    Raises:
        ValueError: as for `load_table`.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        card, arch, entries = str(record["card"]), int(record["arch"]), record["choices"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no tuning table ({error}); write it anew with `make tune`") from error
    choices: dict[TunedKey, TunedChoice] = {}
    for number, entry in enumerate(entries):
        try:
            key, choice = _read_entry(entry)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: choice {number}: {error}; write the table anew with `make tune`") from error
        choices[key] = choice
    return TuningTable(card, arch, choices)


def _read_entry(entry: Mapping[str, Any]) -> tuple[TunedKey, TunedChoice]:
    key = TunedKey(**{name: entry[name] for name in TunedKey.__dataclass_fields__})
    if key.kernel not in _KERNELS:
        raise ValueError(f"kernel is '{key.kernel}', expected one of {', '.join(_KERNELS)}")
    tile = None if entry["tile"] is None else Tile.from_json(entry["tile"])
    split = int(entry["split_k"])
    if split < 1:
        raise ValueError(f"split_k is {split}, expected 1 or more")
    return key, TunedChoice(key.kernel, tile, split)
