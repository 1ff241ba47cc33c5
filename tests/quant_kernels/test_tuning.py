"""What is selected and why: regimes, splits, tables, and that every answer is a kernel that exists."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant_kernels.compiled.variants import Variant, all_variants, make_scheme, schemes
from quant_kernels.scheme import Scheme, ZeroKind
from quant_kernels.tuning.card import KNOWN_CARDS
from quant_kernels.tuning.select import (
    EXPAND,
    EXPAND_ABOVE,
    GATE_UP,
    MATMUL,
    MIN_BLOCKS_PER_SPLIT,
    Problem,
    Selector,
    choose_split,
    programs_per_sm,
    regime,
    select,
    select_gate_up,
)
from quant_kernels.tuning.table import TuningTable, load_table, table_path
from quant_kernels.tuning.tile import Tile

SCHEME = make_scheme(4, 128, ZeroKind.CONST, torch.float16)
ALL_SCHEMES = [scheme for dtype in (torch.float16, torch.bfloat16) for scheme in schemes(dtype)]
H100 = KNOWN_CARDS["h100"]
NOTHING = TuningTable.empty(H100)


def problem(rows: int, in_features: int = 4096, out_features: int = 4096, scheme: Scheme = SCHEME) -> Problem:
    return Problem(rows, in_features, out_features, scheme)


def test_regimes() -> None:
    assert [regime(m) for m in (1, 16, 17, 32, 33, 64, 65, 128, 129, 2048)] == [
        16,
        16,
        32,
        32,
        64,
        64,
        128,
        128,
        256,
        2048,
    ]


@pytest.fixture(scope="module")
def compiled() -> set[Variant]:
    return set(all_variants())


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 5000),
    in_features=st.integers(1, 240).map(lambda n: 128 * n),
    out_features=st.integers(1, 8000).map(lambda n: 8 * n),
    scheme=st.sampled_from(ALL_SCHEMES),
    card=st.sampled_from(sorted(KNOWN_CARDS)),
    half_sums=st.booleans(),
)
def test_whatever_is_selected_was_compiled(
    compiled: set[Variant], rows: int, in_features: int, out_features: int, scheme: Scheme, card: str, half_sums: bool
) -> None:
    asked = problem(rows, in_features, out_features, scheme)
    chosen = select(asked, KNOWN_CARDS[card], NOTHING, half_sums=half_sums)
    arch = KNOWN_CARDS[card].arch
    assert chosen.reason
    kernel = EXPAND if chosen.tile is None else MATMUL
    assert chosen.kernel == kernel
    assert Variant(kernel, scheme, chosen.tile, arch, scheme.dtype) in compiled
    if chosen.tile is not None:
        padded = out_features + -out_features % 128
        assert padded % chosen.tile.block_n == 0
        assert rows <= EXPAND_ABOVE[arch]
        assert chosen.split_k == 1 or in_features // 128 // chosen.split_k >= MIN_BLOCKS_PER_SPLIT // (scheme.bits // 4)
    fused = select_gate_up(problem(rows, in_features, out_features, scheme), KNOWN_CARDS[card], NOTHING)
    assert fused is None or Variant(GATE_UP, scheme, fused.tile, arch, scheme.dtype) in compiled


@pytest.mark.parametrize("name", sorted(KNOWN_CARDS))
def test_the_choice_depends_on_m_only_through_its_regime(name: str) -> None:
    card = KNOWN_CARDS[name]
    ends = [16, 32, 64, *(2**n for n in range(7, 13))]
    for low, high in zip([0, *ends], ends, strict=False):
        choices = {select(problem(m), card, NOTHING) for m in (low + 1, (low + high) // 2 + 1, high)}
        assert len(choices) == 1, f"M {low + 1} to {high}"


def test_expanding_begins_where_the_card_says() -> None:
    for card in KNOWN_CARDS.values():
        most = EXPAND_ABOVE[card.arch]
        assert select(problem(most), card, NOTHING).kernel == MATMUL
        assert select(problem(most + 1), card, NOTHING).kernel == EXPAND
    unknown = replace(H100, arch=100)
    assert select(problem(2049), unknown, NOTHING).reason == "rule: above 2048 rows on sm_100"


def test_a_split_fills_the_card() -> None:
    tile = Tile(16, 128)
    # 32 tiles of columns on 132 multiprocessors: alone they leave three quarters of the card idle.
    assert choose_split(tile, problem(1), H100) > 1
    assert choose_split(tile, problem(1, out_features=128256), H100) in (1, 2)
    assert choose_split(tile, problem(1, in_features=512), H100) == 1
    assert choose_split(Tile(64, 128), problem(100), H100) == 1


def test_programs_per_multiprocessor() -> None:
    assert programs_per_sm(Tile(16, 128), SCHEME, KNOWN_CARDS["3090"]) == 2  # by shared memory
    assert programs_per_sm(Tile(16, 128), SCHEME, H100) == 4  # by registers
    assert programs_per_sm(Tile(64, 256, num_warps=8, num_stages=8), SCHEME, KNOWN_CARDS["3090"]) == 1


def test_float16_sums_are_asked_for_and_only_on_geforce() -> None:
    for name, expected in (("4090", True), ("a100", False)):
        card = KNOWN_CARDS[name]
        chosen = select(problem(200), card, TuningTable.empty(card), half_sums=True)
        assert chosen.tile is not None
        assert chosen.tile.half_sums is expected
        assert ("float16 sums" in chosen.reason) is expected
        plain = select(problem(200), card, TuningTable.empty(card))
        assert plain.tile is not None
        assert not plain.tile.half_sums
    card = KNOWN_CARDS["4090"]
    small = make_scheme(4, 32, ZeroKind.CONST, torch.float16)
    others = [
        problem(1), problem(20, scheme=small), problem(60), problem(200, scheme=replace(SCHEME, dtype=torch.bfloat16)),
        problem(200, scheme=make_scheme(8, 128, ZeroKind.CONST, torch.float16)),
    ]  # fmt: skip
    for other in others:
        chosen = select(other, card, NOTHING, half_sums=True)
        assert chosen.tile is not None
        assert not chosen.tile.half_sums


def test_gate_up_is_fused_where_it_fills_the_card() -> None:
    wide = problem(4, out_features=28672)
    fused = select_gate_up(wide, H100, NOTHING)
    assert fused is not None
    assert fused.kernel == GATE_UP
    assert select_gate_up(problem(4, out_features=4096), H100, NOTHING) is None
    assert select_gate_up(problem(33, out_features=28672), H100, NOTHING) is None
    assert select_gate_up(problem(4, out_features=28672 + 64), H100, NOTHING) is None
    eight = make_scheme(8, 128, ZeroKind.CONST, torch.float16)
    assert select_gate_up(problem(4, out_features=28672, scheme=eight), H100, NOTHING) is None


def entry(**changes: Any) -> dict[str, Any]:
    return {
        "kernel": "matmul", "bits": 4, "dtype": "float16", "group_size": 128, "zero": "const",
        "in_features": 4096, "out_features": 4096, "rows": 16, "tile": Tile(16, 64, num_warps=2).to_json(),
        "split_k": 8, "microseconds": 5.0, **changes,
    }  # fmt: skip


def write(folder: Path, *entries: dict[str, Any]) -> None:
    record = {"card": H100.name, "arch": 90, "choices": list(entries)}
    table_path(H100, folder).write_text(json.dumps(record))


def test_a_table_answers_for_what_was_measured(tmp_path: Path) -> None:
    write(
        tmp_path, entry(), entry(rows=128, tile=None, split_k=1),
        entry(kernel="gate_up", out_features=28672, tile=None, split_k=1),
    )  # fmt: skip
    table = load_table(H100, tmp_path)
    chosen = select(problem(3), H100, table)
    assert (chosen.tile, chosen.split_k) == (Tile(16, 64, num_warps=2), 8)
    assert H100.name in chosen.reason
    assert select(problem(100), H100, table).kernel == EXPAND
    assert "rule" in select(problem(20), H100, table).reason
    assert "rule" in select(problem(3, 8192), H100, table).reason
    assert select_gate_up(problem(3, out_features=28672), H100, table) is None
    other = make_scheme(4, 128, ZeroKind.CONST, torch.bfloat16)
    assert "rule" in select(problem(3, scheme=other), H100, table).reason
    assert Selector(H100, table).matmul(problem(3)) == chosen


def test_what_a_table_selects_is_compiled_too(tmp_path: Path) -> None:
    tile = Tile(16, 128, num_stages=6)
    write(tmp_path, entry(tile=tile.to_json()))
    extra = set(all_variants(tmp_path)) - set(all_variants())
    assert extra == {Variant(MATMUL, SCHEME, tile, 90, torch.float16)}
    tall = Tile(64, 128, 16, num_stages=6, scale_weight=True)
    record = {"card": KNOWN_CARDS["4090"].name, "arch": 89, "choices": [entry(rows=128, tile=tall.to_json())]}
    table_path(KNOWN_CARDS["4090"], tmp_path).write_text(json.dumps(record))
    extra = {v.tile for v in set(all_variants(tmp_path)) - set(all_variants()) if v.arch == 89}
    assert extra == {tall, replace(tall, half_sums=True)}


def test_no_table_is_no_error(tmp_path: Path) -> None:
    assert not load_table(H100, tmp_path).choices


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"tile": {"block_m": 16, "block_n": 128, "colour": 3}}, "unknown fields of a tile: colour"),
        ({"tile": {"block_m": 12, "block_n": 128}}, "block_m is 12"),
        ({"tile": {"block_m": 16, "block_n": 128, "word_rows": 8}}, "word_rows is 8"),
        ({"kernel": "magic"}, "kernel is 'magic'"),
        ({"split_k": 0}, "split_k is 0"),
    ],
)
def test_a_damaged_table_names_the_entry(tmp_path: Path, changes: dict[str, Any], word: str) -> None:
    write(tmp_path, entry(), entry(**changes))
    with pytest.raises(ValueError, match="choice 1") as caught:
        load_table(H100, tmp_path)
    assert word in str(caught.value)
    assert "make tune" in str(caught.value)


def test_a_file_that_is_no_table(tmp_path: Path) -> None:
    table_path(H100, tmp_path).write_text("{")
    with pytest.raises(ValueError, match="no tuning table"):
        load_table(H100, tmp_path)
    write(tmp_path, {k: v for k, v in entry().items() if k != "rows"})
    with pytest.raises(ValueError, match="rows"):
        load_table(H100, tmp_path)


def test_tiles_come_back_from_json() -> None:
    for tile in (Tile(16, 128), Tile(64, 256, 16, 8, 3, scale_weight=True, half_sums=True, max_registers=168)):
        assert Tile.from_json(tile.to_json()) == tile
    with pytest.raises(ValueError, match="half_sums needs"):
        Tile(64, 128, half_sums=True)


def test_file_names() -> None:
    assert KNOWN_CARDS["4090"].slug == "nvidia-geforce-rtx-4090"
    assert replace(H100, name="NVIDIA H100 PCIe (80GB)").slug == "nvidia-h100-pcie-80gb"
