"""`qengine plan` from the command line: the table, the JSON, exit codes, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.models import MODELS
from qengine import cli
from qengine.commands import plan as plan_command
from qengine.commands.flags import CARD_MEMORY, CARD_NAMES
from qengine.config import EngineConfig
from qengine.runtime.opening import open_model_headers
from qengine.runtime.planner import Card, Machine
from qengine.runtime.rank_planning import plan_ranks
from tests.engine.fixtures import path

ROOT = Path(__file__).parents[2]
GIB = 2**30
LLAMA_8B = (str(MODELS / "llama-3-8b"), "--load-format", "dummy", "-q", "awq")
LLAMA_70B = (str(MODELS / "llama-3-70b"), "--load-format", "dummy", "-q", "awq")
PARTS = ("weight_bytes", "step_buffer_bytes", "graph_bytes", "reserve_bytes", "kv_bytes", "free_bytes")


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = cli.main(["plan", *words])
    return code, capsys.readouterr().out


def as_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    code, text = run(capsys, *words, "--json")
    found: dict[str, Any] = json.loads(text)
    assert code == (0 if found["fits"] else 1)
    return found


# JSON


def test_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, *LLAMA_8B, "--group-size", "64", "--gpu", "24GB", "--kv-cache-dtype", "int8")
    assert (found["fits"], found["max_model_len"], found["advice"]) == (True, 8192, [])
    settings = ("quantization", "bits", "group_size", "dtype", "kv_cache_dtype", "block_size", "tensor_parallel_size")
    assert (found["pipeline_parallel_size"], found["stage_layers"]) == (1, [32])
    assert [found[name] for name in settings] == ["awq", 4, 64, "bfloat16", "int8", 16, 1]
    assert found["model"].endswith("llama-3-8b")
    [card] = found["cards"]
    assert card["total_bytes"] == 24 * GIB == sum(card[name] for name in PARTS)
    assert card["kv_bytes"] == card["num_blocks"] * 16 * card["kv_bytes_per_token"]
    assert found["max_concurrency"] == card["num_blocks"] / (8192 / 16)


def test_what_does_not_fit_exits_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, *LLAMA_8B, "--gpu", "8GB", "--max-model-len", "8K")
    assert not found["fits"]
    assert 1000 < found["max_model_len"] < 8192
    assert found["advice"][0] == f"--max-model-len {found['max_model_len']}: the longest context that fits"
    assert as_json(capsys, *LLAMA_8B, "--gpu", "8GB", "--max-model-len", str(found["max_model_len"]))["fits"]
    assert not as_json(capsys, *LLAMA_8B, "--gpu", "8GB", "--max-model-len", str(found["max_model_len"] + 1))["fits"]
    assert as_json(capsys, *LLAMA_8B, "--gpu", "4GB")["max_model_len"] == 0


@pytest.mark.parametrize(("length", "expected"), [("auto", 4064), ("1k", 1000), ("1K", 1024)], ids=["auto", "1k", "1K"])
def test_lengths(capsys: pytest.CaptureFixture[str], length: str, expected: int) -> None:
    found = as_json(capsys, *LLAMA_8B, "--gpu", "8GB", "--kv-cache-dtype", "int8", "--max-model-len", length)
    assert found["fits"]
    assert (found["max_model_len"] == expected) if length != "auto" else 1024 < found["max_model_len"] < 8192


def test_two_cards_mean_two_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    named = as_json(capsys, *LLAMA_70B, "--gpu", "24GB,24GB")
    assert named == as_json(capsys, *LLAMA_70B, "--gpu", "24GB", "-tp", "2")
    assert named == as_json(capsys, *LLAMA_70B, "--gpu", "24GB,24GB", "-tp", "2")
    assert (named["tensor_parallel_size"], len(named["cards"]), named["fits"]) == (2, 2, True)
    alone = as_json(capsys, *LLAMA_70B, "--gpu", "24GB")
    assert not alone["fits"]
    assert any(line.startswith("-tp 2 (with 2 such cards)") for line in alone["advice"])


def test_stages(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Cards that are named are ranks of stages: neighbours share one."""
    monkeypatch.setenv("COLUMNS", "100")
    named = as_json(capsys, *LLAMA_70B, "--gpu", "48GB,24GB", "-pp", "2")
    assert (named["tensor_parallel_size"], named["pipeline_parallel_size"], named["fits"]) == (1, 2, True)
    assert sum(named["stage_layers"]) == 80
    assert named["stage_layers"][0] > 1.7 * named["stage_layers"][1]
    assert named["cards"][0]["weight_bytes"] > 1.7 * named["cards"][1]["weight_bytes"]
    assert [card["graph_bytes"] for card in named["cards"]] == [0, 0]
    one = as_json(capsys, *LLAMA_70B, "--gpu", "24GB", "-pp", "2", "-tp", "2")
    assert (one["tensor_parallel_size"], one["pipeline_parallel_size"], len(one["cards"])) == (2, 2, 4)
    assert one == as_json(capsys, *LLAMA_70B, "--gpu", "24GB,24GB,24GB,24GB", "-pp", "2")
    first = one["stage_layers"][0]
    wanted = f"stages   layers 0-{first - 1} on cards 0-1, layers {first}-79 on cards 2-3"
    assert wanted in run(capsys, *LLAMA_70B, "--gpu", "24GB", "-pp", "2", "-tp", "2")[1]
    short = as_json(capsys, *LLAMA_70B, "--gpu", "16GB", "-pp", "2")
    assert any(line.startswith("-tp 2 (with 4 such cards): fits") for line in short["advice"])


def test_every_flag_reaches_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    usual = as_json(capsys, *LLAMA_8B, "--gpu", "24GB")
    changes: dict[tuple[str, ...], str] = {
        ("--gpu-memory-utilization", "0.5"): "reserve_bytes",
        ("--gpu-memory-limit", "12"): "reserve_bytes",
        ("--kv-cache-memory-bytes", "1GiB"): "kv_bytes",
        ("--max-num-seqs", "8"): "step_buffer_bytes",
        ("--max-num-batched-tokens", "256"): "step_buffer_bytes",
        ("--enforce-eager",): "graph_bytes",
        ("--block-size", "32"): "num_blocks",
        ("--kv-cache-dtype", "fp8"): "kv_bytes_per_token",
        ("--group-size", "32"): "weight_bytes",
        ("--bits", "4", "-q", "gptq"): "weight_bytes",
    }
    for words, figure in changes.items():
        found = as_json(capsys, *LLAMA_8B, "--gpu", "24GB", *words)
        assert found["cards"][0][figure] != usual["cards"][0][figure], words
    assert as_json(capsys, *LLAMA_8B, "--gpu", "24GB", "--dtype", "half")["dtype"] == "float16"


def test_limits_of_each_card(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, *LLAMA_8B, "--gpu", "24GB,24GB", "--gpu-memory-limit", "22,10")
    assert [card["reserve_bytes"] // GIB for card in found["cards"]] == [2, 14]
    assert cli.main(["plan", *LLAMA_8B, "--gpu", "24GB", "--gpu-memory-limit", "22,10"]) == 2
    assert "--gpu-memory-limit has 2 sizes for 1 card" in capsys.readouterr().err


def test_cards_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert tuple(CARD_MEMORY) == CARD_NAMES
    for name, size in CARD_MEMORY.items():
        [card] = as_json(capsys, *LLAMA_8B, "--gpu", name.upper())["cards"]
        assert card["total_bytes"] == int(size * GIB)
    mixed = as_json(capsys, *LLAMA_8B, "--gpu", "3090, 12GB")
    assert [card["name"] for card in mixed["cards"]] == ["RTX 3090", "12 GiB card"]


def test_a_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, path("llama-gptq-actorder-g32"), "--gpu", "1GB", "--max-num-seqs", "4")
    assert (found["quantization"], found["bits"], found["group_size"]) == ("gptq", 4, 32)
    assert found["fits"]


# This machine


def test_the_drivers_cards(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cards = (Card("One", 24 * GIB), Card("Two", 12 * GIB))
    monkeypatch.setattr(plan_command, "driver_cards", lambda: cards)
    for words in ((), ("--gpu", "auto")):
        assert [card["name"] for card in as_json(capsys, *LLAMA_8B, *words)["cards"]] == ["One"]
    found = as_json(capsys, *LLAMA_8B, "--gpu", "auto", "-tp", "2")
    assert [card["total_bytes"] for card in found["cards"]] == [24 * GIB, 12 * GIB]
    assert cli.main(["plan", *LLAMA_8B, "--gpu", "auto", "-tp", "3"]) == 2
    assert "the driver shows 2 GPU(s), and 3 would be needed" in capsys.readouterr().err


def test_without_cards_it_is_the_cpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_command, "driver_cards", lambda: ())
    small = path("llama-gptq-sym-g128")
    [card] = as_json(capsys, small)["cards"]
    assert (card["name"], card["graph_bytes"], card["reserve_bytes"]) == ("cpu", 0, 0)
    assert cli.main(["plan", small, "--gpu", "auto"]) == 2
    assert "name a size or a card, such as --gpu 24GB" in capsys.readouterr().err


def test_ranks_on_a_cpu_are_planned_as_the_engine_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_command, "available_memory", lambda: 4 * GIB)
    small, flags = path("llama-awq-g64"), ("--device", "cpu", "--dtype", "float32", "-tp", "2")
    found = as_json(capsys, small, *flags, "--gpu-memory-limit", "22,10,4")
    config = EngineConfig.from_options({"model": small, "tensor_parallel_size": 2})
    machine = Machine("cpu", (Card("cpu", 4 * GIB),) * 2, "float32", has_graphs=False)
    plan = plan_ranks(open_model_headers(config.load), config, machine)
    assert found["tensor_parallel_size"] == 2
    assert found["max_model_len"] == plan.max_model_len
    assert [card["total_bytes"] for card in found["cards"]] == [4 * GIB]
    for name in (*PARTS, "num_blocks", "kv_bytes_per_token"):
        assert found["cards"][0][name] == getattr(plan.cards[0], name), name
    assert "cpu in 2 ranks" in run(capsys, small, *flags)[1]


# Refusals


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "4900"], "--gpu '4900' is no size such as 24GB and no known card; did you mean '4090'?"),
        (["--gpu", "24GB,"], "--gpu '' is no size such as 24GB"),
        (["--gpu", "3080000"], "--gpu '3080000' is no size such as 24GB"),
        (["--gpu", "24GB,12GB", "-tp", "3"], "--gpu names 2 cards and -tp is 3"),
        (["--gpu", "24GB,12GB", "-pp", "3"], "--gpu names 2 cards and -pp is 3"),
        (["--gpu", "24GB,12GB", "-tp", "2", "-pp", "2"], "--gpu names 2 cards and -tp is 2 and -pp is 2"),
        (["--gpu", "24GB", "-pp", "33"], "--pipeline-parallel-size is 33, but the model has 32 layers"),
        (["--gpu", "24GB", "--device", "cpu"], "--gpu and --device cpu contradict each other"),
        (["--gpu", "24GB", "-tp", "0"], "--tensor-parallel-size is 0"),
        (["--gpu", "24GB", "-tp", "64"], "--tensor-parallel-size is 64, but the model has 32 query heads"),
        (["--gpu", "24GB", "--block-size", "64"], "--block-size is 64, but a GPU's attention takes 16 or 32"),
        (["--gpu", "24GB", "--dtype", "float32"], "--dtype is float32, which has no kernels on a GPU"),
        (["--gpu", "24GB", "--max-model-len", "9000"], "the model was made for at most 8192 positions"),
        (["--gpu", "24GB", "--gpu-memory-limit", "30GB"], "--gpu-memory-limit is 30.00 GiB"),
        (["--gpux", "24GB"], "unknown flag --gpux"),
    ],
)
def test_bad_flags(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert cli.main(["plan", *LLAMA_8B, *words]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert not printed.out


def test_a_folder_without_weights_needs_the_dummy_format(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", LLAMA_8B[0], "--gpu", "24GB"]) == 2
    assert "holds no weights" in capsys.readouterr().err


# The table


@pytest.mark.parametrize("width", [40, 60, 100, 200])
@pytest.mark.parametrize("words", [("--gpu", "24GB"), ("--gpu", "24GB", "-tp", "8"), ("--gpu", "4GB")])
def test_the_table_keeps_its_width(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int, words: tuple[str, ...]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    _, text = run(capsys, *LLAMA_8B, *words)
    assert max(map(len, text.splitlines())) <= max(width, len(LLAMA_8B[0]) + 20)
    assert "\033" not in text
    rows = [line.split()[0] for line in text.splitlines() if line.strip()]
    for purpose in ("weights", "step", "reserve", "KV", "free", "total"):
        assert purpose in rows


def test_what_the_table_says(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    code, text = run(capsys, *LLAMA_70B, "--gpu", "24GB,12GB")
    lines = text.splitlines()
    assert code == 1
    assert next(line for line in lines if "card 0" in line).split() == ["card", "0", "card", "1"]
    total = next(line for line in lines if line.startswith("total"))
    assert total.split() == ["total", "24.00", "GiB", "12.00", "GiB"]
    assert "fits     no: a context of 8192 tokens does not" in text
    assert "What would help:" in text


def test_a_model_that_does_not_fit_shows_the_table_when_it_starts(capsys: pytest.CaptureFixture[str]) -> None:
    model = path("llama-gptq-sym-g128")
    words = ["generate", model, "--prompt", "x", "--device", "cpu", "--kv-cache-memory-bytes", "900TiB"]
    assert cli.main(words) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert "\nweights " in printed
    assert "no --kv-cache-memory-bytes: fits a context of " in printed


# Lightness

PROGRAM = """
import sys
from qengine import cli
code = cli.main(sys.argv[1:])
heavy = {"torch", "triton", "transformers", "safetensors"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else code)
"""


@pytest.mark.parametrize("words", [LLAMA_70B, (path("llama-awq-g64"),), ()], ids=["dummy", "safetensors", "gguf"])
def test_torch_is_never_imported(words: tuple[str, ...]) -> None:
    """What makes it answer at once: torch alone takes longer than the whole plan may."""
    command = [sys.executable, "-c", PROGRAM, "plan", *words, "--gpu", "48GB"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
