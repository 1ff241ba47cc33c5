"""docs/memory.md shows what the planner says, and the planner says what comes out by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import memory_table
from benchmarks.gpu.models import MODELS
from benchmarks.memory_table import BEGIN, CACHES, END, LEAN, ROWS, Row, put_into
from qengine import cli

DOCUMENT = Path(__file__).parents[2] / "docs" / "memory.md"
GIB = 2**30


def test_the_document_is_what_the_command_makes() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert put_into(text) == text, "run: python -m benchmarks.memory_table docs/memory.md"


def test_a_document_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="expected the lines"):
        put_into("nothing")


def test_the_tables_hold_every_row() -> None:
    text = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    wanted = [
        *((m, "1 x 24GB") for m in ("llama-2-7b", "llama-2-13b", "llama-3-8b", "qwen2.5-14b", "qwen2.5-32b")),
        *((m, "2 x 24GB") for m in ("llama-3-70b", "qwen2.5-72b")),
        ("llama-2-7b", "1 x 8GB"),
    ]
    for model, cards in wanted:
        # What the card holds, the context by default, and lean.
        assert text.count(f"| {model} | {cards} |") == 3


def sizes(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((MODELS / name / "config.json").read_text())
    return found


def packed(rows: int, columns: int) -> int:
    """Bytes of a 4-bit linear whose sizes need no padding but N to 128: codes, scales, zero points, a row of zeros."""
    assert rows % 128 == 0
    columns = -(-columns // 128) * 128
    return columns * rows // 2 + 2 * (rows // 128 + 1) * columns * 2


def weights_by_hand(config: dict[str, Any], inner: int, vocab: int, ranks: int) -> int:
    """A rank with `inner` columns of the MLP and `vocab` rows of the tables, and a fair part of the heads."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    head_dim = hidden // config["num_attention_heads"]
    q = config["num_attention_heads"] * head_dim // ranks
    kv = config["num_key_value_heads"] * head_dim // ranks
    # Qwen2 has a bias of 16 bits on q, k and v.
    bias = 2 * (q + 2 * kv) if config["model_type"] == "qwen2" else 0
    layer = packed(hidden, q + 2 * kv) + bias + packed(q, hidden) + packed(hidden, 2 * inner) + packed(inner, hidden)
    norms = (2 * layers + 1) * hidden * 2
    return layers * layer + norms + 2 * vocab * hidden * 2


#: What the first of the ranks has: MLP columns, and rows of the vocabulary.
PARTS = {
    "llama-2-7b": (11008, 32000),
    "llama-2-13b": (13824, 32000),
    "llama-3-8b": (14336, 128256),
    "qwen2.5-14b": (13824, 152064),
    "qwen2.5-32b": (27648, 152064),
    "llama-3-70b": (14336, 64128),
    # 231 groups of 128: 116 for the first. 152064 rows are 1188 tiles of 128: 594 each.
    "qwen2.5-72b": (116 * 128, 76032),
}
#: Numbers that a token adds to the cache of one card: 2 x layers x KV heads x 128.
KV_NUMBERS = {
    "llama-2-7b": 2 * 32 * 32 * 128,
    "llama-2-13b": 2 * 40 * 40 * 128,
    "llama-3-8b": 2 * 32 * 8 * 128,
    "qwen2.5-14b": 2 * 48 * 8 * 128,
    "qwen2.5-32b": 2 * 64 * 8 * 128,
    "llama-3-70b": 2 * 80 * 4 * 128,
    "qwen2.5-72b": 2 * 80 * 4 * 128,
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.model}-{row.cards}")
def test_a_row_by_hand(row: Row) -> None:
    config, (inner, vocab) = sizes(row.model), PARTS[row.model]
    ranks = row.cards.count(",") + 1
    for _, cache in CACHES:
        plan = row.plan(cache)
        card = plan["cards"][0]
        assert card["weight_bytes"] == weights_by_hand(config, inner, vocab, ranks)
        # 8-bit caches have a scale of 2 bytes for each 128 numbers.
        numbers = KV_NUMBERS[row.model]
        assert card["kv_bytes_per_token"] == (2 * numbers if cache == "auto" else numbers + numbers // 128 * 2)
        limits = {c["total_bytes"] - int(c["total_bytes"] * 0.92) + GIB // 2 for c in plan["cards"]}
        assert all(c["reserve_bytes"] >= max(limits) for c in plan["cards"])
        room = min(_room(c) for c in plan["cards"])
        assert card["num_blocks"] == room // (16 * card["kv_bytes_per_token"])
        tokens = 16 * card["num_blocks"]
        assert plan["max_model_len"] == min(config["max_position_embeddings"], tokens)


def _room(card: dict[str, int]) -> int:
    taken = ("weight_bytes", "step_buffer_bytes", "graph_bytes", "reserve_bytes")
    return card["total_bytes"] - sum(card[name] for name in taken)


def test_known_sizes() -> None:
    """A look from outside: 7B in 4 bits is 3.5 to 4 GiB, 70B on two cards half of 36 to 40 each."""
    assert 3.5 < Row("llama-2-7b", "24GB").plan("auto")["cards"][0]["weight_bytes"] / GIB < 4
    assert 18 < Row("llama-3-70b", "24GB,24GB").plan("auto")["cards"][0]["weight_bytes"] / GIB < 20


def test_lean_flags_leave_more() -> None:
    for row in ROWS:
        assert row.plan("auto", LEAN)["cards"][0]["num_blocks"] > row.plan("auto")["cards"][0]["num_blocks"]


def test_it_prints(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory_table, "ROWS", ROWS[:1])
    assert memory_table.main([]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("| model | cards |")
    document = tmp_path / "document.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert memory_table.main([str(document)]) == 0
    assert document.read_text() == f"before\n{BEGIN}\n\n{printed}\n{END}\nafter\n"


def _examples() -> list[tuple[list[str], list[str]]]:
    """The document's commands, as words, and what it says that they print."""
    blocks = re.findall(r"```console\n\$ qengine plan (.+)\n((?:.+\n|\n)+?)```", DOCUMENT.read_text(encoding="utf-8"))
    assert len(blocks) == 2
    return [(command.split(), text.splitlines()) for command, text in blocks]


def test_the_examples_are_what_the_command_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """But for the model's name: it is planned from its config alone."""
    monkeypatch.setenv("COLUMNS", "100")
    for (name, *flags), wanted in _examples():
        folder = MODELS / name.lower().removesuffix("-awq")
        assert cli.main(["plan", str(folder), "--load-format", "dummy", "-q", "awq", *flags]) == 0
        printed = capsys.readouterr().out.splitlines()
        for line in wanted:
            assert line in printed or line.startswith("  model") or line == "  ...", line
