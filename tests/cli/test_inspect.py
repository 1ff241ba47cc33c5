"""`qengine inspect` from the command line: the table, the JSON, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from qengine import cli
from qengine.commands import inspect
from qengine.commands.flags import CARD_NAMES
from qengine.commands.parsing import parse
from qengine.commands.settings import InspectSettings, inspect_settings
from qengine.config import LoadConfig
from qengine.runtime.inspection import summarize_loaded
from qengine.runtime.loader import load_decoder, open_model
from qengine.runtime.platform import Platform
from quant_kernels.linear import dispatch
from quant_kernels.linear.cpu_check import checked_library
from quant_kernels.tuning.card import KNOWN_CARDS, Card
from tests.engine.fixtures import path
from tests.runtime.test_inspection import dummy_folder

ROOT = Path(__file__).parents[2]
HAS_GPU = torch.cuda.is_available()
#: Without it a machine's own GPU would answer.
HERE = ("--device", "cpu")


@pytest.fixture(autouse=True)
def _a_terminal_of_100_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")


def output(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["inspect", *words]) == 0
    return capsys.readouterr().out


def as_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(output(capsys, *words, "--json"))
    return found


def test_flags_become_settings() -> None:
    given = inspect_settings(
        parse("inspect", ["m", "--gpu", "H100", "--rows", "2k", "--bandwidth", "50.5", "--json", "-q", "awq"])
    )
    load = LoadConfig(model="m", quantization="awq")
    assert given == InspectSettings(load, "h100", 2000, 50.5e9, as_json=True)
    assert inspect_settings(parse("inspect", [])) == InspectSettings(LoadConfig())


def test_the_cards_that_can_be_named_are_those_that_are_known() -> None:
    assert tuple(KNOWN_CARDS) == CARD_NAMES


# The table


def test_the_bundled_model_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, *HERE)
    lines = text.splitlines()
    assert lines[0] == "  model    SmolLM2-135M-Instruct (llama, GGUF Q4_1 (210), Q8_0 (1))"
    assert lines[1] == "  runs as  bfloat16 on cpu, 30 layers"
    header = next(line for line in lines if line.startswith("linear"))
    assert header.split() == ["linear", "K", "->", "N", "format", "kernel", "MB", "share"]
    rows = [line.split() for line in lines if " -> " in line and line is not header]
    assert [row[:2] for row in rows] == [[n, f"x{c}"] for n, c in zip(
        ("qkv", "o", "gate_up", "down", "head"), (30, 30, 30, 30, 1), strict=True
    )]  # fmt: skip
    total = next(line for line in lines if line.startswith("total")).split()
    assert float(total[1]) == pytest.approx(sum(float(row[-2]) for row in rows), abs=0.3)
    assert sum(float(row[-1].rstrip("%")) for row in rows) == pytest.approx(100, abs=0.3)
    # No bandwidth, no bound; no card, no tiles.
    assert "tok/s" not in text
    assert "issue" not in text


def test_a_bandwidth_gives_a_bound(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, *HERE, "--bandwidth", "20")
    assert "on cpu (20 GB/s)" in text
    # Torch's int4 kernel holds scales in more bytes, and 8 bits as twice four.
    bound = "197 tok/s at most: 5.09 ms" if checked_library() is None else "207 tok/s at most: 4.82 ms"
    assert f"{bound} per step at 20 GB/s" in text
    assert " us " in text


@pytest.mark.parametrize("has_library", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_cpu_shows_the_kernels_that_an_engine_takes(
    dtype: str, has_library: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not has_library:
        monkeypatch.setattr(dispatch, "checked_library", lambda: None)
    model = path("llama-gptq-sym-g128")
    shown = as_json(capsys, model, *HERE, "--dtype", dtype)["linears"]
    target = Platform.of(torch.device("cpu"), getattr(torch, dtype), enforce_eager=False).target
    loaded = summarize_loaded(load_decoder(open_model(LoadConfig(model=model)), target, 64).linears())
    expected = [(one.name, one.kernel, one.reason, one.num_bytes) for one in loaded]
    assert [(one["name"], one["kernel"], one["reason"], one["num_bytes"]) for one in shown] == expected
    if dtype == "bfloat16":
        is_ours = has_library and checked_library() is not None
        assert shown[0]["kernel"] == ("cpu_int8" if is_ours else "cpu_int4")


@pytest.mark.parametrize("gpu", CARD_NAMES)
def test_every_card_in_100_columns(gpu: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    folder = dummy_folder(tmp_path, hidden_size=2048, num_attention_heads=16, vocab_size=128256)
    text = output(capsys, str(folder), "--load-format", "dummy", "-q", "gptq", "--gpu", gpu)
    assert max(len(line) for line in text.splitlines() if str(tmp_path) not in line) <= 100
    card = KNOWN_CARDS[gpu]
    assert f"bfloat16 on {card.name} ({card.bytes_per_s / 1e9:g} GB/s)" in text
    assert "r32 w4 s4" in text
    assert "tok/s at most" in text


def test_the_readme_shows_real_output(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of its command as it stands there, run in a checkout."""
    pytest.importorskip("triton")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [command] = [line for line in readme.splitlines() if line.startswith("$ qengine inspect ")]
    monkeypatch.chdir(ROOT)
    assert output(capsys, *command.split()[3:]) in readme


def test_the_readmes_plan_is_real(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [(words, shown)] = re.findall(r"^\$ qengine plan (.+?) \| jq .*\n(\{[^}]+\})$", readme, re.MULTILINE)
    monkeypatch.chdir(ROOT)
    assert cli.main(["plan", *words.split()]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: found[name] for name in json.loads(shown)} == json.loads(shown)


def test_what_is_slow_is_marked_and_comes_first(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, path("llama-gptq-actorder-g32"), *HERE)
    assert "\n ! qkv, o, gate_up        activation order: gathers its input in every step\n" in text
    marked = [line.split()[0] for line in text.splitlines() if line.split()[1:3] == ["!", "x3"]]
    assert marked == ["qkv", "o", "gate_up"]
    assert text.index(" ! qkv, o") < text.index("   head ")
    float32 = output(capsys, path("llama-gptq-actorder-g32"), *HERE, "--dtype", "float32")
    assert " ! qkv, o, gate_up, down  expanded at load: " in float32


def test_long_reasons_are_wrapped_under_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    lines = output(capsys, "--gpu", "3090").splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("   qkv, o"))
    assert lines[first + 1].startswith(" " * lines[first].index("4-bit"))


# JSON


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    found = as_json(capsys, path("llama-gptq-sym-g128"), "--gpu", "4090", "--rows", "4")
    assert list(found) == [
        *("model", "architecture", "format", "dtype", "device", "num_layers", "num_sequences", "bytes_per_s"),
        *("linears", "totals", "kv_cache"),
    ]
    assert (found["device"], found["bytes_per_s"]) == ("NVIDIA GeForce RTX 4090", 1008e9)
    assert (found["num_layers"], found["num_sequences"]) == (3, 4)
    linear = found["linears"][0]
    assert list(linear) == [
        *("name", "num_layers", "in_features", "out_features", "format", "kernel", "configuration", "split_k"),
        *("reason", "num_bytes", "issue_share", "is_expanded", "slow", "notes", "is_slow", "microseconds", "share"),
    ]
    assert (linear["kernel"], linear["configuration"]) == ("matmul", "16x64 r32 w2 s4")
    totals = found["totals"]
    assert totals["bytes_per_step"] == sum(one["num_bytes"] for one in found["linears"])
    assert totals["bytes_per_token"] == totals["bytes_per_step"] / 4
    assert totals["microseconds"] == pytest.approx(sum(one["microseconds"] for one in found["linears"]))
    assert totals["tokens_per_s"] == pytest.approx(4e6 / totals["microseconds"])
    assert sum(one["share"] for one in found["linears"]) == pytest.approx(1)
    assert [cost["dtype"] for cost in found["kv_cache"]] == ["bfloat16", "int8"]


def test_what_is_not_known_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, path("llama-autogptq-perchannel"), *HERE)
    assert found["bytes_per_s"] is None
    assert found["totals"]["microseconds"] is None
    assert found["linears"][0]["issue_share"] is None
    assert found["linears"][0]["configuration"] is None


def test_a_bandwidth_replaces_the_cards(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    words = (path("llama-awq-g64"), "--gpu", "a100")
    published, halved = as_json(capsys, *words), as_json(capsys, *words, "--bandwidth", "1019.5")
    assert halved["totals"]["tokens_per_s"] == pytest.approx(published["totals"]["tokens_per_s"] / 2)
    assert halved["linears"][0]["issue_share"] == pytest.approx(published["linears"][0]["issue_share"] / 2)


# This machine's GPU


def test_the_machines_own_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    known = KNOWN_CARDS["3090"]
    card = Card(known.name, 86, 82, known.shared_per_block, known.shared_per_sm, known.l2_bytes, is_geforce=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(inspect, "card_of", lambda device: card)
    found = as_json(capsys, path("llama-awq-g64"))
    assert (found["device"], found["bytes_per_s"]) == (known.name, known.bytes_per_s)
    assert found["linears"][0]["issue_share"] is not None
    assert as_json(capsys, path("llama-awq-g64"), *HERE)["device"] == "cpu"
    monkeypatch.setattr(inspect, "card_of", lambda device: Card("NVIDIA X", 86, 82, 101376, 102400, 1))
    unknown = as_json(capsys, path("llama-awq-g64"))
    assert (unknown["device"], unknown["bytes_per_s"]) == ("NVIDIA X", None)
    assert unknown["linears"][0]["issue_share"] is None


# Refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing-here"], "no model at 'nothing-here'; give a folder, a .gguf file, a hub id"),
        (["EMPTY"], "no weights, expected *.safetensors or a .gguf file"),
        (["EMPTY", "--load-format", "dummy"], "--load-format dummy needs a folder with a config.json"),
        ([path("llama-awq-g64"), "-q", "gptq"], "but quantization 'gptq' was asked for"),
        pytest.param(
            [path("llama-awq-g64"), "--device", "cuda"],
            "--device 'cuda' is not there: this machine has no GPU that torch can use; name one with --gpu",
            marks=pytest.mark.skipif(HAS_GPU, reason="there is a GPU"),
        ),
    ],
)
def test_one_line_and_exit_code_2(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", *[str(tmp_path) if word == "EMPTY" else word for word in words]]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert message in shown.err
    assert shown.err.count("\n") == 1


def test_a_damaged_table_of_a_card(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def damaged(card: Card) -> Any:
        raise ValueError("card.json is no tuning table")

    monkeypatch.setattr(inspect, "load_table", damaged)
    assert cli.main(["inspect", path("llama-awq-g64"), "--gpu", "4090"]) == 2
    assert "no kernel can be chosen for NVIDIA GeForce RTX 4090: card.json is no tuning" in capsys.readouterr().err


def test_the_name_of_a_folder_gives_no_orders_to_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a\x1b[2Jmodel"
    folder.symlink_to(Path(path("llama-awq-g64")).resolve())
    for words in (["inspect", *HERE], ["plan"]):
        assert cli.main([*words, str(folder)]) == 0
        printed = capsys.readouterr()
        assert "a\\x1b[2Jmodel" in printed.out
        assert "\x1b" not in printed.out + printed.err
