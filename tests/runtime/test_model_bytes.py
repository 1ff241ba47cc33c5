"""Bytes by arithmetic against bytes of what is really made: weights of every format, the KV cache, a step's buffers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from converters.source import HeaderSource, LinearSlot
from qengine.config import LoadConfig, ModelConfig, RopeConfig
from qengine.layers.rope import RotaryEmbedding
from qengine.parallel.group import TPGroup
from qengine.parallel.split import stage_layers
from qengine.runtime.device_inputs import DeviceSteps, StaticInputs
from qengine.runtime.kv_cache import KVCache
from qengine.runtime.loader import OpenedModel, load_decoder, open_model
from qengine.runtime.model_bytes import (
    ITEM_FIELDS,
    ModelFacts,
    attention_scratch_bytes,
    buckets,
    graph_bytes,
    native_room_bytes,
    rope_bytes,
    rounding_bytes,
    static_input_bytes,
    step_bytes,
    weight_bytes,
)
from qengine.runtime.opening import open_model_headers, split_opened
from quant_kernels.attention.kv_format import KV_FORMATS, plain
from quant_kernels.attention.work import NUM_FIELDS
from quant_kernels.footprint import (
    GATHER_BYTES,
    Kernels,
    WeightFacts,
    cut_inputs,
    fuse,
    kv_bytes_per_token,
    kv_number_bytes,
    prepared_bytes,
)
from quant_kernels.linear.cpu_check import checked_library
from quant_kernels.linear.cpu_int8 import CpuInt8Linear
from quant_kernels.linear.dispatch import Target, prepare
from quant_kernels.linear.p16.layout import pack
from quant_kernels.packed_weight import DenseWeight, PackedWeight
from quant_kernels.packing import concat_outputs
from quant_kernels.sharding import slice_inputs
from quant_kernels.tuning.card import KNOWN_CARDS
from quant_kernels.tuning.select import Selector
from quant_kernels.tuning.table import TuningTable
from tests.engine.fixtures import NAMES, path
from tests.parallel.threads import Baton, ThreadHub
from tests.quant_kernels.records import random_record

CPU = torch.device("cpu")
CARD = KNOWN_CARDS["4090"]
SELECTOR = Selector(CARD, TuningTable.empty(CARD))
LIBRARY = checked_library()
NATIVE = [] if LIBRARY is None else [Target(CPU, torch.bfloat16, native=LIBRARY)]
#: The CPU's kernels, torch's and our own, and dense weights; P16 as a GPU has it, laid out by the interpreter.
TARGETS = [
    Target(CPU, torch.bfloat16),
    Target(CPU, torch.float32),
    Target(CPU, torch.float16, SELECTOR),
    Target(CPU, torch.bfloat16, SELECTOR),
    *NATIVE,
]
IDS = ["cpu-bfloat16", "cpu-float32", "p16-float16", "p16-bfloat16", "native-bfloat16"][: len(TARGETS)]
#: K, N, group size: whole blocks, blocks and columns that are not full, groups of several blocks, one group, tiny ones.
SIZES = [
    (256, 256, 128),
    (288, 200, 32),
    (192, 136, 64),
    (768, 128, 256),
    (576, 64, 192),
    (320, 144, 320),
    (128, 24, 8),
]
#: Nothing divides evenly: heads of 24, a vocabulary that fills no tile.
TINY: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "vocab_size": 150,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def kernels_of(target: Target) -> Kernels:
    return "gpu" if target.selector is not None else "cpu" if target.native is None else "native"


def planned_bytes(model: ModelFacts, target: Target) -> int:
    return weight_bytes(model, model.split(1).ranks[0], kernels_of(target), dtype_name(target.dtype))


def loaded_bytes(opened: OpenedModel, target: Target) -> int:
    return load_decoder(opened, target, opened.config.max_position).num_bytes


# Whole models


@pytest.mark.parametrize("target", TARGETS, ids=IDS)
@pytest.mark.parametrize("name", NAMES)
def test_weights_of_checkpoints(name: str, target: Target) -> None:
    load = LoadConfig(model=path(name))
    assert planned_bytes(ModelFacts.of(open_model_headers(load)), target) == loaded_bytes(open_model(load), target)


@pytest.mark.parametrize("target", [TARGETS[0], *NATIVE], ids=[IDS[0], "native-bfloat16"][: 1 + len(NATIVE)])
def test_weights_of_the_bundled_model(target: Target) -> None:
    load = LoadConfig()
    model = ModelFacts.of(open_model_headers(load))
    assert (model.quantization, model.tied) == ("gguf", True)
    assert planned_bytes(model, target) == loaded_bytes(open_model(load), target)


@pytest.mark.parametrize("target", TARGETS, ids=IDS)
@pytest.mark.parametrize(
    ("quantization", "options"),
    [
        (None, {}),
        ("awq", {"group_size": 32}),
        ("awq", {"group_size": -1}),
        ("gptq", {"group_size": 16}),
        ("gptq", {"group_size": 32, "bits": 8}),
        ("gptq", {"group_size": -1, "bits": 3}),
    ],
)
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"architectures": ["Qwen3ForCausalLM"]}])
def test_weights_of_dummies(
    tmp_path: Path, changes: dict[str, Any], quantization: str | None, options: dict[str, int], target: Target
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TINY, **changes}))
    load = LoadConfig(model=str(tmp_path), load_format="dummy", quantization=quantization, **options)
    model = ModelFacts.of(open_model_headers(load))
    assert planned_bytes(model, target) == loaded_bytes(open_model(load), target)
    assert (model.quantization, model.bits) == (quantization, options.get("bits", 4) if quantization else None)
    assert model.group_size == (options["group_size"] if quantization else None)


@pytest.mark.parametrize("target", TARGETS, ids=IDS)
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("name", NAMES)
def test_weights_of_ranks(name: str, num_ranks: int, target: Target) -> None:
    """Exact, but for o_proj in activation order: how many rows of padding it takes only its data can tell."""
    load = LoadConfig(model=path(name))
    model, opened = ModelFacts.of(open_model_headers(load)), open_model(load)
    split = split_opened(opened, num_ranks)
    assert split == model.split(num_ranks)
    for rank, transport in zip(split.ranks, ThreadHub(num_ranks, Baton()).transports(), strict=True):
        planned = weight_bytes(model, rank, kernels_of(target), dtype_name(target.dtype))
        loaded = load_decoder(opened, target, 64, group=TPGroup(transport, split)).num_bytes
        assert loaded <= planned
        assert loaded == planned or "actorder" in name


class MixedDowns:
    """A source whose first layer has a down_proj in larger groups than the others."""

    def __init__(self, source: HeaderSource, group_size: int) -> None:
        self._source, self._group_size = source, group_size

    def linear_facts(self, slot: LinearSlot) -> WeightFacts:
        facts = self._source.linear_facts(slot)
        return replace(facts, group_size=self._group_size) if slot.name.endswith("layers.0.mlp.down_proj") else facts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


def test_stages_are_cut_as_the_whole_model_is() -> None:
    opened = open_model_headers(LoadConfig(model=path("llama-awq-g64")))
    mixed = replace(opened, source=MixedDowns(opened.source, 192))
    whole = split_opened(mixed, 2)
    assert [len(split.ranks[0].intermediate) for split in (split_opened(opened, 2), whole)] == [256, 384]
    for layers in stage_layers(opened.config.num_layers, 3):
        assert ModelFacts.of(mixed, layers).split(2) == whole


def check_stages(load: LoadConfig, target: Target) -> None:
    """However many stages there are, each is planned as it is loaded."""
    opened = open_model(load)
    for num_stages in range(2, opened.config.num_layers + 1):
        for layers in stage_layers(opened.config.num_layers, num_stages):
            planned = planned_bytes(ModelFacts.of(opened, layers), target)
            assert planned == load_decoder(opened, target, 64, layers=layers).num_bytes


@pytest.mark.parametrize("target", TARGETS, ids=IDS)
@pytest.mark.parametrize("name", NAMES)
def test_weights_of_stages(name: str, target: Target) -> None:
    check_stages(LoadConfig(model=path(name)), target)


@pytest.mark.parametrize("target", TARGETS, ids=IDS)
def test_weights_of_stages_with_a_tied_head(tmp_path: Path, target: Target) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "num_hidden_layers": 3, "tie_word_embeddings": True}))
    check_stages(LoadConfig(model=str(tmp_path), load_format="dummy"), target)


# One weight


def facts_of(weight: PackedWeight) -> WeightFacts:
    return WeightFacts(
        weight.in_features,
        weight.out_features,
        bits=weight.bits,
        group_size=weight.group_size,
        zero_const=weight.zero_const,
        has_mins=weight.mins is not None,
        scale_dtype=dtype_name(weight.scales.dtype),
        has_order=weight.perm is not None,
        bias_dtype=None if weight.bias is None else dtype_name(weight.bias.dtype),
    )


@pytest.mark.parametrize("target", TARGETS, ids=IDS)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["const", "zeros", "mins"])
@pytest.mark.parametrize(("rows", "columns", "group"), SIZES)
def test_a_prepared_weight(
    rows: int, columns: int, group: int, kind: str, bits: int, act_order: bool, target: Target
) -> None:
    record = random_record(rows, columns, group, kind=kind, bits=bits, bias=True, act_order=act_order)
    expected = prepare(record, target).num_bytes
    assert prepared_bytes(facts_of(record), kernels_of(target), dtype_name(target.dtype)) == expected


@pytest.mark.parametrize("target", TARGETS, ids=IDS)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group", [16, 32, 128, 512])
@pytest.mark.parametrize("inputs", [range(192), range(192, 512), range(200), range(203, 512), range(512)], ids=str)
def test_a_part_of_a_weight(inputs: range, group: int, act_order: bool, target: Target) -> None:
    record = random_record(512, 40, group, bias=True, act_order=act_order)
    for with_bias in (False, True):
        part = slice_inputs(record, inputs, with_bias=with_bias)
        assert isinstance(part, PackedWeight)
        facts = cut_inputs(facts_of(record), inputs, with_bias=with_bias)
        loaded = prepare(part, target).num_bytes
        planned = prepared_bytes(facts, kernels_of(target), dtype_name(target.dtype))
        if facts.is_padded:
            assert loaded <= planned
            assert part.in_features <= facts.in_features
            assert act_order or part.in_features == facts.in_features
        else:
            assert facts_of(part) == facts
            assert loaded == planned


def test_the_words_of_a_card_are_the_words_of_the_interpreter() -> None:
    record = random_record(256, 200, 64, kind="zeros", bits=4)
    assert prepared_bytes(facts_of(record), "gpu", "float16") == pack(record, torch.float16, CPU).num_bytes


@pytest.mark.parametrize("kinds", [("const", "const"), ("const", "zeros"), ("mins", "mins")])
def test_fused_weights(kinds: tuple[str, str]) -> None:
    parts = [random_record(128, 40, 32, kind=kind, bits=4, bias=i == 1) for i, kind in enumerate(kinds)]
    [merged] = fuse([facts_of(part) for part in parts])
    whole = concat_outputs(parts)
    assert merged == facts_of(whole)
    assert prepared_bytes(merged, "cpu", "bfloat16") == prepare(whole, TARGETS[0]).num_bytes


def test_what_does_not_fuse_stays_apart() -> None:
    first = WeightFacts(128, 40, bits=4, group_size=32, zero_const=8)
    for other in (
        WeightFacts(128, 40),
        replace(first, group_size=64),
        replace(first, bits=8),
        replace(first, has_order=True),
        replace(first, scale_dtype="bfloat16"),
        replace(first, zero_const=None, has_mins=True),
    ):
        assert fuse([first, other]) == [first, other]
    assert fuse([WeightFacts(128, 40), WeightFacts(128, 8)]) == [WeightFacts(128, 48)]


def test_a_dense_weight() -> None:
    weight = DenseWeight(torch.zeros(40, 24), torch.zeros(40))
    expected = prepare(weight, Target(CPU, torch.bfloat16)).num_bytes
    assert prepared_bytes(WeightFacts(24, 40, bias_dtype="float32"), "cpu", "bfloat16") == expected


# Cache and steps

CONFIG = ModelConfig("qwen2", 150, 96, 160, 2, 4, 2, 24, 64, 1e-6, RopeConfig(), False, windows=(None, 32))


@pytest.mark.parametrize("name", ["auto", *KV_FORMATS])
def test_the_cache(name: str) -> None:
    kv_format = plain(torch.bfloat16) if name == "auto" else KV_FORMATS[name]
    cache = KVCache(CONFIG, 3, 16, kv_format, CPU)
    per_token = kv_bytes_per_token(CONFIG.num_kv_heads, CONFIG.head_dim, *kv_number_bytes(name, "bfloat16"))
    assert cache.num_bytes == 3 * 16 * CONFIG.num_layers * per_token


def test_buffers_of_a_step() -> None:
    rope = RotaryEmbedding(CONFIG.rope, CONFIG.head_dim, CONFIG.max_position, CPU)
    assert rope_bytes(CONFIG, CONFIG.max_position) == sum(t.numel() * t.element_size() for t in (rope.cos, rope.sin))
    steps = DeviceSteps(CONFIG, rope, plain(torch.float16), 16, CARD, CPU)
    assert attention_scratch_bytes(CONFIG) == steps.scratch.num_bytes
    assert ITEM_FIELDS == NUM_FIELDS
    for bucket in buckets(16):
        made = StaticInputs(steps, bucket, max_blocks=4).num_bytes
        assert made <= static_input_bytes(bucket, 4, num_windows=2) <= made + 4 * 2 * 1024 * NUM_FIELDS + 1024


def test_a_step_by_hand() -> None:
    # Residual, norms and neighbours 5 x 96, gate, up and product 3 x 160, two bytes each; 256 rows.
    activations = 2 * 256 * (5 * 96 + 3 * 160)
    # Each of 8 sampled rows: a logit in 2 bytes, thrice in float32, and compared.
    logits = 32 * 150 * 15  # Few rows are sampled; so many positions of a prompt get logits at once.
    # Cosines and sines of 64 positions and 12 pairs; 1024 slots of 4 heads of 24 sums and 2 statistics, 2 counters.
    tables, scratch = 64 * 12 * 2 * 4, 1024 * (4 * 26 * 4 + 2 * 4)
    fixed = 384 * 2**20
    two = {"kv_number_bytes": 2}
    assert step_bytes(CONFIG, 256, 40, 64, **two) - step_bytes(CONFIG, 256, 32, 64, **two) == 8 * 150 * 15
    assert step_bytes(CONFIG, 256, 8, 64, **two) == activations + logits + tables + scratch + fixed
    gathered = 2 * (2 * 256 * 96 + 32 * 150)
    several = step_bytes(CONFIG, 256, 8, 64, num_ranks=2, **two)
    assert several == activations + logits + tables + scratch + fixed + gathered
    assert step_bytes(CONFIG, 256, 8, 64, has_head=False, **two) == activations + tables + scratch + fixed
    on_cpu = step_bytes(CONFIG, 256, 8, 64, on_gpu=False, **two)
    assert on_cpu == activations + logits + tables + 64 * 2**20 + 64 * 2**20


@pytest.mark.parametrize(("number_bytes", "each"), [(4, 4), (2, 2), (1, 12)])
def test_a_cpu_gathers_a_slice_or_one_long_sequence(number_bytes: int, each: int) -> None:
    """Keys and values of 2 heads of 24; bytes become float32, with two copies in other orders."""
    longest = 2**21
    found = step_bytes(CONFIG, 1, 1, longest, kv_number_bytes=number_bytes, on_gpu=False)
    short = step_bytes(CONFIG, 1, 1, 64, kv_number_bytes=number_bytes, on_gpu=False)
    gathered = longest * 2 * CONFIG.num_kv_heads * CONFIG.head_dim * each
    assert found - short == gathered - GATHER_BYTES + rope_bytes(CONFIG, longest) - rope_bytes(CONFIG, 64)


@pytest.mark.parametrize("target", NATIVE, ids=IDS[4:])
@pytest.mark.parametrize("num_threads", [1, 7])
@pytest.mark.parametrize("name", NAMES)
def test_scratch_of_our_own_kernels(name: str, num_threads: int, target: Target) -> None:
    """What the library asks for by itself, for all layers in one call and for every linear alone."""
    assert target.native is not None
    load = LoadConfig(model=path(name))
    model, opened = ModelFacts.of(open_model_headers(load)), open_model(load)
    functions = target.native.functions
    for num_ranks in (1, 2):
        split = split_opened(opened, num_ranks)
        for rank, transport in zip(split.ranks, ThreadHub(num_ranks, Baton()).transports(), strict=True):
            loaded = load_decoder(opened, target, 64, group=TPGroup(transport, split))
            parts = [part for linear in loaded.linears() for part in linear.parts]
            linears = [part for part in parts if isinstance(part, CpuInt8Linear)]
            assert linears
            for rows in (1, 20, 256, 1000):
                planned = native_room_bytes(model, rank, rows, num_threads)
                sizes = ((linear.in_features, linear.record.k) for linear in linears)
                assert max(functions.qk_linear_room(rows, *size, num_threads) for size in sizes) <= planned
                if loaded.stack is not None:
                    assert loaded.stack.room_bytes(rows, num_threads) <= planned


def test_graphs_by_hand() -> None:
    # Buckets of 1, 2 and 4: the largest step's activations once; a result, integers and nodes of each.
    activations = 2 * 4 * (5 * 96 + 3 * 160)
    each = sum(2 * 96 * b + static_input_bytes(b, 4, 2) + 8 * 2**20 for b in (1, 2, 4))
    assert graph_bytes(CONFIG, 4, 64, 16) == activations + each


@pytest.mark.parametrize(
    ("most", "expected"), [(1, (1,)), (3, (1, 2, 4)), (16, (1, 2, 4, 8, 16)), (20, (1, 2, 4, 8, 16, 24))]
)
def test_buckets_reach_the_largest_batch(most: int, expected: tuple[int, ...]) -> None:
    assert buckets(most) == expected
    assert buckets(1000)[-1] == 256


def test_segments_are_handed_out_whole() -> None:
    mib = 2**20
    # 512 bytes at least; three of 6 MiB share 20; whole pairs of MiB from 10 on.
    assert rounding_bytes(iter([(100, 2)])) == 2 * 412
    assert rounding_bytes(iter([(6 * mib, 1)])) == 20 * mib // 3 - 6 * mib
    assert rounding_bytes(iter([(11 * mib, 4), (12 * mib, 1)])) == 4 * mib
