"""Inspection: the same records from headers and samples as from the loaded model, and everything slow is named."""

from __future__ import annotations

import itertools
import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from converters.dummy_source import DummyScheme, DummySource
from converters.source import LinearKind, LinearSlot, Weight
from qengine.config import LoadConfig
from qengine.models.decoder import Materials, build
from qengine.runtime import loader
from qengine.runtime.inspection import Inspection, inspect_model, log_linears, summarize_loaded
from qengine.runtime.loader import OpenedModel, load_decoder, open_model
from qengine.runtime.opening import linear_slot
from quant_kernels.linear import dispatch
from quant_kernels.linear.dispatch import Target
from quant_kernels.tuning.card import KNOWN_CARDS, Card
from quant_kernels.tuning.select import Selector
from quant_kernels.tuning.table import TunedChoice, TunedKey, TuningTable
from quant_kernels.tuning.tile import Tile
from tests.engine.fixtures import NAMES, path

CPU = torch.device("cpu")
LLAMA_8B: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
}


def on_card(card: Card, dtype: torch.dtype = torch.float16, table: TuningTable | None = None) -> Target:
    return Target(torch.device("cuda"), dtype, Selector(card, table or TuningTable.empty(card)))


def dummy_folder(folder: Path, **changes: Any) -> Path:
    """Llama 3 8B's config with 3 layers, a quarter of its width, and no weights."""
    small = {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 3, "vocab_size": 4096}
    (folder / "config.json").write_text(json.dumps({**LLAMA_8B, **small, **changes}))
    return folder


def open_dummy(folder: Path, quantization: str | None = "gptq", **changes: Any) -> OpenedModel:
    load = LoadConfig(model=str(dummy_folder(folder, **changes)), load_format="dummy", quantization=quantization)
    return open_model(load)


class CountingSource(DummySource):
    """Counts what is read; keeps some linears dense, by a part of their name."""

    def __init__(self, source: DummySource, dense: tuple[str, ...] = ()) -> None:
        scheme = None if source.quantization is None else DummyScheme(source.quantization)
        super().__init__(source.path, source.config, scheme, 0)
        self.dense = dense
        self.reads: Counter[str] = Counter()

    def _scheme_of(self, name: str) -> DummyScheme | None:
        return None if any(part in name for part in self.dense) else super()._scheme_of(name)

    def read_linear(self, slot: LinearSlot) -> Weight:
        self.reads[slot.name] += 1
        return super().read_linear(slot)


def with_dense(opened: OpenedModel, *dense: str) -> tuple[OpenedModel, CountingSource]:
    assert isinstance(opened.source, DummySource)
    source = CountingSource(opened.source, dense)
    return replace(opened, source=source), source


def by_name(found: Inspection) -> dict[str, Any]:
    return {linear.name: linear for linear in found.linears}


# The same as what is loaded


@pytest.mark.parametrize(
    ("model", "dtype"),
    [*itertools.product(map(path, NAMES), (torch.bfloat16, torch.float32)), (None, torch.bfloat16)],
)
def test_it_says_what_loading_does(model: str | None, dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    opened = open_model(LoadConfig(model=model))
    found = inspect_model(opened, Target(CPU, dtype))
    linears = list(load_decoder(opened, Target(CPU, dtype), 64).linears())
    assert list(found.linears) == summarize_loaded(linears)
    assert found.num_bytes == sum(part.bytes_per_pass for linear in linears for part in linear.parts)
    with caplog.at_level(logging.INFO, logger="qengine.runtime.inspection"):
        log_linears(linears)
    assert [record.getMessage() for record in caplog.records] == [linear.text for linear in found.linears]


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_a_card_would_hold(name: str) -> None:
    """Packed for the card on this machine's memory: no kernel runs."""
    pytest.importorskip("triton")
    opened = open_model(LoadConfig(model=path(name)))
    found = inspect_model(opened, on_card(KNOWN_CARDS["3090"], torch.bfloat16))
    here = replace(on_card(KNOWN_CARDS["3090"], torch.bfloat16), device=CPU)
    source = opened.source
    materials = Materials(
        lambda shape: source.read_tensor(loader.TensorSlot(shape.name, shape.shape)),
        lambda shape: source.read_linear(linear_slot(shape)),
        here,
    )
    linears = list(build(opened.config, materials, tied=opened.tied, max_position=64).linears())
    assert list(found.linears) == summarize_loaded(linears)
    assert found.num_bytes == sum(part.bytes_per_pass for linear in linears for part in linear.parts)
    assert {part.kernel for linear in linears[:-1] for part in linear.parts} == {"p16"}


# Reading little


def test_one_linear_of_each_kind_is_read(tmp_path: Path) -> None:
    opened, source = with_dense(open_dummy(tmp_path, num_hidden_layers=5))
    found = inspect_model(opened, Target(CPU, torch.bfloat16))
    assert [linear.num_layers for linear in found.linears] == [5, 5, 5, 5, 1]
    assert sorted(source.reads.values()) == [1] * 7
    assert all(name.startswith("model.layers.0.") for name in source.reads)


def test_nothing_of_a_plain_model_is_read(tmp_path: Path) -> None:
    opened, source = with_dense(open_dummy(tmp_path, None))
    found = inspect_model(opened, Target(CPU, torch.bfloat16))
    assert not source.reads
    assert {linear.kernel for linear in found.linears} == {"dense"}
    assert not any(linear.is_slow for linear in found.linears)


@pytest.mark.parametrize("model", [*map(path, NAMES), None])
def test_kinds_read_no_data(model: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_model(LoadConfig(model=model))

    def refuse(*args: Any) -> Any:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("converters.files.DataFile.read", refuse)
    shapes = loader.slots(opened.config, tied=opened.tied)
    kinds = [loader.linear_kind(opened, s) for s in shapes if isinstance(s, loader.LinearShape)]
    assert all(isinstance(kind, LinearKind) for kind in kinds)
    # q and o have one shape, so they are one kind where they are stored alike: in all layers.
    assert len(set(kinds)) < len(kinds) / 2


def test_layers_that_differ_have_rows_of_their_own(tmp_path: Path) -> None:
    opened, source = with_dense(open_dummy(tmp_path), "layers.1.mlp.down")
    found = inspect_model(opened, Target(CPU, torch.bfloat16))
    assert [(row.kernel, row.num_layers) for row in found.linears if row.name == "down"] == [
        ("cpu_int4", 2),
        ("dense", 1),
    ]
    assert source.reads["model.layers.0.mlp.down_proj"] == 1


# What is slow


def test_parts_that_do_not_fuse(tmp_path: Path) -> None:
    opened, _ = with_dense(open_dummy(tmp_path), "k_proj", "up_proj")
    found = by_name(inspect_model(opened, Target(CPU, torch.bfloat16)))
    assert list(found) == ["qkv.q", "qkv.k", "qkv.v", "o", "gate_up.gate", "gate_up.up", "down", "head"]
    assert found["qkv.k"].slow == ("3 launches instead of one: some parts are quantized and some are not",)
    assert found["gate_up.up"].slow == ("2 launches instead of one: some parts are quantized and some are not",)
    assert not found["o"].is_slow


@pytest.mark.parametrize("target", [Target(CPU, torch.bfloat16), on_card(KNOWN_CARDS["h100"])], ids=["cpu", "h100"])
def test_activation_order(target: Target) -> None:
    if target.selector is not None:
        pytest.importorskip("triton")
    found = by_name(inspect_model(open_model(LoadConfig(model=path("llama-gptq-actorder-g32"))), target))
    for name in ("qkv", "o", "gate_up"):
        if target.selector is None:
            assert found[name].slow == ("activation order: gathers its input in every step",)
        else:
            assert not found[name].is_slow
            [note] = found[name].notes
            assert note.endswith("stores its columns in that order, which costs nothing")
    assert not found["down"].is_slow
    assert found["down"].notes == ("activation order folded into gate and up, where it costs nothing",)


def test_expanded_weights_say_why() -> None:
    opened = open_model(LoadConfig(model=path("llama-awq-g64")))
    found = by_name(inspect_model(opened, Target(CPU, torch.float32)))
    assert found["qkv"].is_slow
    assert found["qkv"].reason == "expanded at load: torch's int4 kernel is fast in bfloat16 only, not float32"
    assert found["qkv"].num_bytes == 3 * 256 * 512 * 4
    assert not found["head"].is_slow


def test_a_card_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "try_import", lambda module: None)
    opened = open_model(LoadConfig(model=path("llama-awq-g64")))
    found = by_name(inspect_model(opened, on_card(KNOWN_CARDS["4090"])))
    assert found["o"].reason == "expanded at load: triton is not installed; run: pip install triton"
    assert found["o"].kernel == "dense"


def test_instructions_as_the_limit(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    opened = open_dummy(tmp_path)
    card = KNOWN_CARDS["h100"]
    fast = by_name(inspect_model(opened, on_card(card)))["qkv"]
    slow = by_name(inspect_model(opened, on_card(replace(card, clock_hz=card.clock_hz / 4))))["qkv"]
    assert not fast.is_slow
    assert slow.issue_share == pytest.approx(4 * fast.issue_share)
    assert slow.slow[0].startswith("instructions, not memory, would be the limit: ")


# What a card launches


def test_measured_choices_come_first(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    card, tile = KNOWN_CARDS["4090"], Tile(16, 128, num_stages=5)
    key = TunedKey("matmul", 4, "float16", 128, "const", 1024, 1024, 16)
    table = TuningTable(card.name, card.arch, {key: TunedChoice("matmul", tile, 2)})
    found = by_name(inspect_model(open_dummy(tmp_path), on_card(card, table=table)))
    assert found["o"].configuration == "16x128 r32 w4 s5 /2"
    assert found["o"].split_k == 2
    assert found["o"].reason.endswith(f"; measured on {card.name}")
    assert "; rule: " in found["down"].reason


def test_many_rows_expand_and_say_so(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    found = inspect_model(open_dummy(tmp_path), on_card(KNOWN_CARDS["h100"]), num_sequences=300)
    row = by_name(found)["down"]
    assert (row.kernel, row.configuration, row.issue_share) == ("expand", None, None)
    assert row.notes[0].startswith("expanded in every step")


# Bounds


def test_totals_and_bounds(tmp_path: Path) -> None:
    opened = open_dummy(tmp_path)
    one = inspect_model(opened, Target(CPU, torch.bfloat16), bytes_per_s=1e9)
    many = inspect_model(opened, Target(CPU, torch.bfloat16), num_sequences=8, bytes_per_s=1e9)
    assert one.num_bytes == many.num_bytes == sum(linear.num_bytes for linear in one.linears)
    assert one.seconds == one.num_bytes / 1e9
    assert one.tokens_per_s == pytest.approx(1e9 / one.num_bytes)
    assert many.tokens_per_s == pytest.approx(8 * one.tokens_per_s)
    assert inspect_model(opened, Target(CPU, torch.bfloat16)).tokens_per_s is None


def test_the_cache_and_the_context_that_equals_the_weights(tmp_path: Path) -> None:
    opened = open_dummy(tmp_path)
    found = inspect_model(opened, Target(CPU, torch.bfloat16))
    own, small = found.cache
    assert own.bytes_per_token == 2 * 3 * 8 * 32 * 2
    assert (own.dtype, small.dtype, small.bytes_per_token) == ("bfloat16", "int8", 2 * 3 * 8 * (32 + 2))
    assert own.equal_context == found.num_bytes // own.bytes_per_token
    shared = inspect_model(opened, Target(CPU, torch.bfloat16), num_sequences=4)
    assert shared.cache[0].equal_context == found.num_bytes // (4 * own.bytes_per_token)


@pytest.mark.parametrize(
    ("windows", "expected"),
    [((None,) * 3, 1.0), ((2.0,) * 3, 1.0), ((0.9, None, None), 1.05), ((0.9, None, 0.9), 1.2), ((0.9,) * 3, None)],
)
def test_sliding_windows_bound_what_is_read(
    tmp_path: Path, windows: tuple[float | None, ...], expected: float | None
) -> None:
    """Windows in units of the context at which full attention reads as much as the weights."""
    opened = open_dummy(tmp_path)
    unit = inspect_model(opened, Target(CPU, torch.bfloat16)).cache[0].equal_context
    assert unit is not None
    lengths = tuple(None if window is None else round(window * unit) for window in windows)
    windowed = replace(opened, config=replace(opened.config, windows=lengths))
    found = inspect_model(windowed, Target(CPU, torch.bfloat16)).cache[0].equal_context
    assert found == (None if expected is None else pytest.approx(expected * unit, abs=2))
