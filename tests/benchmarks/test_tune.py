"""The tuner without a GPU: what it would time, and how tables are merged and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import tune
from quant_kernels.compiled.variants import make_scheme
from quant_kernels.linear.p16.layout import pack
from quant_kernels.scheme import ZeroKind
from quant_kernels.tuning.card import KNOWN_CARDS
from quant_kernels.tuning.select import MATMUL, matmul_tiles
from quant_kernels.tuning.table import TunedKey, load_table, table_path
from quant_kernels.tuning.tile import Tile
from tests.quant_kernels.records import random_record

SCHEME = make_scheme(4, 128, ZeroKind.CONST, torch.float16)
H100 = KNOWN_CARDS["h100"]


@pytest.mark.parametrize("name", sorted(KNOWN_CARDS))
@pytest.mark.parametrize("rows", tune.DEFAULT_ROWS)
def test_candidates_fit_the_card_and_include_the_rule(name: str, rows: int) -> None:
    card = KNOWN_CARDS[name]
    found = tune.candidates(card, rows, SCHEME)
    assert set(matmul_tiles(card.arch, rows, SCHEME).values()) <= set(found)
    assert all(tile.shared_bytes(4, card.arch) <= card.shared_per_block for tile in found)
    assert len(found) < 40


def test_entrants_fill_the_columns_and_expanding_is_tried_where_m_is_large() -> None:
    packed = pack(random_record(1024, 384, 128), torch.float16, torch.device("cpu"))
    few = tune.entrants(H100, 16, packed)
    assert all(way.tile is not None and 384 % way.tile.block_n == 0 for way in few)
    assert {way.split_k for way in few} == {1, 2}
    many = tune.entrants(H100, 128, packed)
    assert many[-1] == tune.Entrant(None, 1)
    assert {way.split_k for way in many} == {1}
    assert many[-1].name == "expand + cuBLAS"
    assert few[-1].name.endswith("K / 2")


def entry(rows: int, split: int) -> dict[str, Any]:
    key = TunedKey.of(MATMUL, SCHEME, 4096, 4096, rows)
    fields = {name: getattr(key, name) for name in TunedKey.__dataclass_fields__}
    return {**fields, "tile": Tile(16, 128).to_json(), "split_k": split, "microseconds": 5.0}


def test_a_new_measurement_replaces_the_old_one_and_the_rest_stays(tmp_path: Path) -> None:
    old = tune.merge(None, H100, [entry(16, 1), entry(32, 1)], "first")
    table = tune.merge(old, H100, [entry(16, 8)], "second")
    assert [(c["rows"], c["split_k"]) for c in table["choices"]] == [(16, 8), (32, 1)]
    path = table_path(H100, tmp_path)
    path.write_text(tune.table_text(table))
    assert json.loads(path.read_text()) == json.loads(json.dumps(table))
    found = load_table(H100, tmp_path).find(MATMUL, SCHEME, 4096, 4096, 16)
    assert found is not None
    assert found.split_k == 8
    assert path.read_text().count("\n  {") == 2


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    assert "run it where there is one" in capsys.readouterr().err


def test_wrong_options(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--shapes", "9b"], ["--rows", "many"], ["--dtype", "float8"]):
        with pytest.raises(SystemExit) as caught:
            tune.main(arguments)
        assert caught.value.code == 2
    assert "invalid choice" in capsys.readouterr().err
