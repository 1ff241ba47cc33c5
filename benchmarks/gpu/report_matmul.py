"""The matmuls of a GPU run as text: a table per kind of weight, the ratio to each peer, and the aims.

Works on records alone. `TARGETS` are aims, not tests: a card that misses them is told so and nothing fails.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.gpu.tables import Record, table

OWN = "qengine"
#: (contender, from rows, to rows, ratio): how many times faster than a peer the kernel aims to be on an H100.
TARGETS = (
    ("torch int4", 4, 16, 1.0),
    ("cuBLAS", 1, 16, 2.0),
    ("cuBLAS", 17, 1 << 30, 0.9),
    ("GemLite", 1, 16, 1.5),
    ("Marlin", 1, 16, 0.9),
)


def sections(records: Sequence[Record], copy_bytes_per_s: float | None) -> Iterator[str]:
    """A table per kind of weight, then results that are wrong."""
    for group, members in _groups(records):
        yield _table(group, list(members), copy_bytes_per_s)
    yield _wrong(records)


def notes(records: Iterable[Record]) -> list[str]:
    """Why contenders are missing."""
    return list(dict.fromkeys(f"{r['contender']}: {r['why']}" for r in records if r["status"] != "measured"))


def ratios(records: Iterable[Record]) -> Iterator[tuple[Record, str, float]]:
    """(record of ours, peer, how many times faster ours is) wherever both were measured."""
    for key, contenders in _problems(records).items():
        own = contenders.get(OWN)
        if own is None or own["status"] != "measured":
            continue
        for name, other in contenders.items():
            if name != OWN and other["status"] == "measured":
                assert key, "problems have a key"
                yield own, name, other["us"] / own["us"]


def target_lines(records: Sequence[Record]) -> list[str]:
    """For each aim that has figures: the lowest ratio, where it was, and how many problems reach it."""
    found = list(ratios(records))
    lines = []
    for peer, low, high, wanted in TARGETS:
        group = [(r, own) for own, name, r in found if name == peer and low <= own["rows"] <= high]
        if not group:
            continue
        worst, where = min(group, key=lambda item: item[0])
        reached = sum(r >= wanted for r, _ in group)
        rows = f"M {low} to {high}" if high < 1 << 30 else f"M from {low}"
        lines.append(
            f"{rows}: {wanted:.1f}x {peer} on {reached} of {len(group)} problems; lowest {worst:.2f}x "
            f"({where['shape']}, M {where['rows']}, {where['dtype']}, group {where['group_size'] or 'K'})"
        )
    return lines


def _groups(records: Sequence[Record]) -> Iterator[tuple[tuple[Any, ...], Iterator[Record]]]:
    keys = dict.fromkeys((r["dtype"], r["group_size"], r["zero"]) for r in records)
    for key in keys:
        yield key, (r for r in records if (r["dtype"], r["group_size"], r["zero"]) == key)


def _problems(records: Iterable[Record]) -> dict[tuple[Any, ...], dict[str, Record]]:
    found: dict[tuple[Any, ...], dict[str, Record]] = {}
    for r in records:
        key = (r["dtype"], r["group_size"], r["zero"], r["shape"], r["rows"])
        found.setdefault(key, {})[r["contender"]] = r
    return found


def _table(group: tuple[Any, ...], records: Sequence[Record], copy_bytes_per_s: float | None) -> str:
    dtype, group_size, zero = group
    names = [n for n in dict.fromkeys(r["contender"] for r in records if r["status"] == "measured") if n != OWN]
    header = ["layer", "M", "us", "GB/s", "of copy", "TFLOPS", "configuration", *(f"vs {n}" for n in names)]
    lines = []
    for contenders in _problems(records).values():
        own = contenders.get(OWN)
        if own is not None and own["status"] == "measured":
            lines.append(_cells(own, contenders, names, copy_bytes_per_s))
    zeros = "constant zero point" if zero == "const" else "integer zero points"
    return f"## 4-bit weights, groups of {group_size or 'K'}, {zeros}, {dtype}\n\n" + table(
        header, lines, text=("layer", "configuration")
    )


def _cells(own: Record, contenders: Mapping[str, Record], names: Sequence[str], bandwidth: float | None) -> list[str]:
    seconds = own["us"] * 1e-6
    rate = own["bytes"] / seconds
    split = f", K / {own['split_k']}" if own["split_k"] > 1 else ""
    others = [contenders.get(name) for name in names]
    return [
        own["shape"],
        str(own["rows"]),
        f"{own['us']:.1f}",
        f"{rate / 1e9:.0f}",
        f"{rate / bandwidth:.0%}" if bandwidth else "-",
        f"{own['flop'] / seconds / 1e12:.1f}",
        own["configuration"] + split,
        *(f"{o['us'] / own['us']:.2f}x" if o and o["status"] == "measured" else "-" for o in others),
    ]


def _wrong(records: Sequence[Record]) -> str:
    """Problems whose result was off by more than its bound: their times mean nothing."""
    wrong = [r for r in records if r["contender"] == OWN and r["error"] > r["error_bound"]]
    lines = [f"- WRONG RESULT: {r['shape']}, M {r['rows']}, {r['dtype']}: error {r['error']:.1e}" for r in wrong]
    return "\n".join(lines)
