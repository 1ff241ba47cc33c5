"""GPTQ folders of every kind, written by the test, read back exactly."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from converters.open import open_checkpoint
from converters.source import LinearSlot
from quant_kernels.packed_weight import DenseWeight
from tests.converters.folders import (
    MODULE,
    assert_equal,
    gptq_config,
    open_checked,
    read_linear,
    read_packed,
    refusal,
    slot_of,
    write_folder,
    write_json,
)
from tests.converters.reference import Quantized, gptq_tensors, pack, random_linear, unpack

BITS = (2, 3, 4, 8)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING)
    return caplog


# Zero points


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("convention", ["v1", "v2"])
def test_conventions(
    tmp_path: Path, warnings: pytest.LogCaptureFixture, bits: int, symmetric: bool, convention: str
) -> None:
    linear = random_linear(128, 64, 32, bits=bits, symmetric=symmetric)
    layout = {"v1": "gptq", "v2": "gptq_v2"}[convention]
    config = gptq_config(bits, 32, sym=symmetric, checkpoint_format=layout)
    write_folder(tmp_path, gptq_tensors(MODULE, linear, convention), config)
    weight = read_packed(tmp_path, slot_of(linear))
    assert_equal(weight, linear.weight)
    assert (weight.zero_const is not None) == symmetric
    assert weight.bits == max(bits, 4)
    assert not warnings.records


def test_a_symmetric_file_that_mislabels_its_zeros(tmp_path: Path, warnings: pytest.LogCaptureFixture) -> None:
    linear = random_linear(128, 64, 32, symmetric=True)
    write_folder(tmp_path, gptq_tensors(MODULE, linear, "v2"), gptq_config(group_size=32, sym=True))
    assert_equal(read_packed(tmp_path, slot_of(linear)), linear.weight)
    assert not warnings.records


def test_a_symmetric_file_whose_zeros_differ_is_asymmetric(tmp_path: Path, warnings: pytest.LogCaptureFixture) -> None:
    modules = {f"model.layers.{i}.mlp.up_proj": random_linear(128, 64, 32, seed=i) for i in range(3)}
    tensors = {k: v for name, linear in modules.items() for k, v in gptq_tensors(name, linear).items()}
    write_folder(tmp_path, tensors, gptq_config(group_size=32, sym=True))
    slots = [slot_of(linear, name) for name, linear in modules.items()]
    source = open_checked(tmp_path, slots)
    for slot in slots:
        assert_equal(source.read_linear(slot), modules[slot.name].weight)
    assert len(warnings.records) == 1, "one warning for the file, not one per layer"
    assert "symmetric" in warnings.text


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zeros_of_gptqmodel_borrow_across_fields(tmp_path: Path, bits: int) -> None:
    linear = random_linear(64, 32, 32, bits=bits)
    zeros = np.random.default_rng(1).integers(0, 2**bits, linear.zeros.shape)
    zeros[:, ::3] = 0
    linear = Quantized(bits, linear.codes, zeros, linear.scales, linear.groups)
    config = gptq_config(bits, 32, meta={"quantizer": ["gptqmodel:5.4.2"]})
    write_folder(tmp_path, gptq_tensors(MODULE, linear, "whole word"), config)
    assert_equal(read_packed(tmp_path, slot_of(linear)), linear.weight)


@pytest.mark.parametrize("quantizer", [["gptqmodel:5.4.2"], None])
def test_zeros_of_three_bits_wrap_in_each_field(tmp_path: Path, quantizer: list[str] | None) -> None:
    linear = random_linear(64, 32, 32, bits=3)
    zeros = np.random.default_rng(1).integers(0, 8, linear.zeros.shape)
    linear = Quantized(3, linear.codes, zeros, linear.scales, linear.groups)
    write_folder(tmp_path, gptq_tensors(MODULE, linear), gptq_config(3, 32, meta={"quantizer": quantizer}))
    assert_equal(read_packed(tmp_path, slot_of(linear)), linear.weight)


@pytest.mark.parametrize("bits", BITS)
def test_fields_less_one_wrap_without_a_known_writer(tmp_path: Path, bits: int) -> None:
    linear = random_linear(64, 32, 32, bits=bits)
    linear.zeros[0, :8] = 0
    write_folder(tmp_path, gptq_tensors(MODULE, linear), gptq_config(bits, 32))
    assert_equal(read_packed(tmp_path, slot_of(linear)), linear.weight)


def test_a_symmetric_layer_needs_no_qzeros(tmp_path: Path, warnings: pytest.LogCaptureFixture) -> None:
    linear = random_linear(128, 64, 32, symmetric=True)
    tensors = gptq_tensors(MODULE, linear)
    del tensors[f"{MODULE}.qzeros"]
    write_folder(tmp_path, tensors, gptq_config(group_size=32, sym=True))
    assert_equal(read_packed(tmp_path, slot_of(linear)), linear.weight)
    assert not warnings.records


# Groups


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("in_features", "group_size"),
    [(128, -1), (128, 16), (128, 32), (128, 64), (256, 128), (160, 64), (160, 128), (96, 256)],
)
@pytest.mark.parametrize("act_order", [False, True])
def test_group_sizes(
    tmp_path: Path,
    warnings: pytest.LogCaptureFixture,
    bits: int,
    in_features: int,
    group_size: int,
    act_order: bool,
) -> None:
    linear = random_linear(in_features, 32, group_size, bits=bits)
    if act_order:
        linear = linear.with_groups(np.random.default_rng(2).permutation(linear.groups))
    write_folder(tmp_path, gptq_tensors(MODULE, linear), gptq_config(bits, group_size, desc_act=act_order))
    weight = read_packed(tmp_path, slot_of(linear))
    assert_equal(weight, linear.weight)
    assert (weight.perm is not None) == (act_order and len(linear.scales) > 1)
    assert not warnings.records


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_keep_their_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    linear = random_linear(128, 64, 32, dtype=dtype)
    write_folder(tmp_path, gptq_tensors(MODULE, linear), gptq_config(group_size=32))
    weight = read_packed(tmp_path, slot_of(linear))
    assert torch.equal(weight.scales, linear.scales)
    assert weight.scales.dtype == dtype
    assert_equal(weight, linear.weight)


def test_shapes_win_over_the_configuration(tmp_path: Path, warnings: pytest.LogCaptureFixture) -> None:
    linear = random_linear(128, 64, 32, bits=8)
    write_folder(tmp_path, gptq_tensors(MODULE, linear), gptq_config(4, 128))
    assert_equal(read_packed(tmp_path, slot_of(linear)), linear.weight)
    assert len(warnings.records) >= 1
    assert "128" in warnings.text or "32" in warnings.text


def test_a_declared_group_size_settles_what_shapes_leave_open(tmp_path: Path) -> None:
    """96 rows in two groups are 64 + 32 or 48 + 48."""
    for group_size in (48, 64):
        linear = random_linear(96, 32, group_size)
        folder = write_folder(tmp_path / str(group_size), gptq_tensors(MODULE, linear), gptq_config(4, group_size))
        assert_equal(read_packed(folder, slot_of(linear)), linear.weight)


# g_idx


def test_activation_order_sorts_rows_stably(tmp_path: Path) -> None:
    linear = random_linear(128, 32, 32)
    groups = np.random.default_rng(3).permutation(linear.groups)
    linear = linear.with_groups(groups)
    write_folder(tmp_path, gptq_tensors(MODULE, linear), gptq_config(group_size=32, desc_act=True))
    weight = read_packed(tmp_path, slot_of(linear))
    assert weight.perm is not None
    assert weight.perm.tolist() == np.argsort(groups, kind="stable").tolist()
    # The way back: words and g_idx rebuilt from the record are those of the file.
    rebuilt = np.empty(128, np.int64)
    rebuilt[weight.perm.numpy()] = np.arange(128) // weight.group_size
    assert rebuilt.tolist() == groups.tolist()
    codes = np.empty((128, 32), np.int64)
    codes[weight.perm.numpy()] = unpack(weight.codes.numpy().T, 4).T
    assert np.array_equal(pack(codes.T, 4).T, pack(linear.codes.T, 4).T)


@pytest.mark.parametrize("desc_act", [True, False])
@pytest.mark.parametrize("present", [True, False])
def test_natural_order(tmp_path: Path, warnings: pytest.LogCaptureFixture, desc_act: bool, present: bool) -> None:
    """Whatever desc_act says, the tensor decides; older files have none."""
    linear = random_linear(128, 32, 32)
    tensors = gptq_tensors(MODULE, linear)
    if not present:
        del tensors[f"{MODULE}.g_idx"]
    write_folder(tmp_path, tensors, gptq_config(group_size=32, desc_act=desc_act))
    weight = read_packed(tmp_path, slot_of(linear))
    assert weight.perm is None
    assert_equal(weight, linear.weight)
    assert not warnings.records


def test_activation_order_counts_although_desc_act_is_false(tmp_path: Path) -> None:
    linear = random_linear(128, 32, 32)
    linear = linear.with_groups(np.random.default_rng(4).permutation(linear.groups))
    write_folder(tmp_path, gptq_tensors(MODULE, linear), gptq_config(group_size=32, desc_act=False))
    assert_equal(read_packed(tmp_path, slot_of(linear)), linear.weight)


def test_a_g_idx_of_zeros_is_a_placeholder(tmp_path: Path, warnings: pytest.LogCaptureFixture) -> None:
    linear = random_linear(128, 32, 32)
    write_folder(tmp_path, gptq_tensors(MODULE, linear, g_idx=np.zeros(128)), gptq_config(group_size=32))
    weight = read_packed(tmp_path, slot_of(linear))
    assert weight.perm is None
    assert_equal(weight, linear.weight)
    assert len(warnings.records) == 1
    assert "g_idx" in warnings.text


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_irregular_groups_become_exact_dense_weights(tmp_path: Path, bits: int, symmetric: bool) -> None:
    linear = random_linear(128, 32, 32, bits=bits, symmetric=symmetric)
    linear = linear.with_groups(np.random.default_rng(5).integers(0, 4, 128))
    write_folder(tmp_path, gptq_tensors(MODULE, linear), gptq_config(bits, 32, desc_act=True, sym=symmetric))
    weight = read_linear(tmp_path, slot_of(linear))
    assert isinstance(weight, DenseWeight)
    assert weight.weight.dtype == torch.float32
    assert_equal(weight, linear.weight)


@pytest.mark.parametrize("value", [-1, 4, 2**31 - 1])
def test_a_g_idx_outside_the_groups_is_refused(tmp_path: Path, value: int) -> None:
    linear = random_linear(128, 32, 32)
    groups = linear.groups.copy()
    groups[5] = value
    write_folder(tmp_path, gptq_tensors(MODULE, linear, g_idx=groups), gptq_config(group_size=32))
    assert f"{MODULE}.g_idx" in refusal(tmp_path, [slot_of(linear)])


# dynamic


ATTENTION = "model.layers.0.self_attn.q_proj"
UP = "model.layers.1.mlp.up_proj"


def test_dynamic_overrides_and_skips(tmp_path: Path, warnings: pytest.LogCaptureFixture) -> None:
    """`up` has 8 bits, its own group size and zero points; `q_proj` is not quantized at all."""
    down = random_linear(96, 32, 64, symmetric=True)
    up = random_linear(96, 32, 48, bits=8, symmetric=True, seed=1)
    up = Quantized(8, np.minimum(up.codes + 1, 255), up.zeros + 1, up.scales, up.groups)
    dense = torch.randn(32, 96).half()
    tensors = {**gptq_tensors(MODULE, down), **gptq_tensors(UP, up), f"{ATTENTION}.weight": dense}
    dynamic = {
        r"-:.*self_attn\.q_proj": {},
        r"up_proj": {"bits": 2},
        r"+:model\.layers\.1\.mlp\.up": {"bits": 8, "group_size": 48, "sym": False},
        r".*": {},
    }
    write_folder(tmp_path, tensors, gptq_config(4, 64, sym=True, dynamic=dynamic))
    slots = [slot_of(down), slot_of(up, UP), LinearSlot(ATTENTION, 96, 32)]
    source = open_checked(tmp_path, slots)
    assert_equal(source.read_linear(slots[0]), down.weight)
    assert_equal(source.read_linear(slots[1]), up.weight)
    unquantized = source.read_linear(slots[2])
    assert isinstance(unquantized, DenseWeight)
    assert torch.equal(unquantized.weight, dense)
    assert not warnings.records


@pytest.mark.parametrize(
    ("rules", "group_size"),
    [
        ({r".*down": {"group_size": 48}, r"model": {"group_size": 64}}, 48),
        ({r"model": {"group_size": 64}, r".*down": {"group_size": 48}}, 64),
        ({r"down": {"group_size": 48}}, 64),
        ({r"+:model\.layers\.0": {"group_size": 48}}, 48),
    ],
    ids=["the first match wins", "in either order", "a match starts at the start", "but need not reach the end"],
)
def test_dynamic_matches(tmp_path: Path, rules: dict[str, Any], group_size: int) -> None:
    """Two groups of 96 rows look alike at 48 and at 64, so only the declaration tells."""
    linear = random_linear(96, 32, group_size)
    write_folder(tmp_path, gptq_tensors(MODULE, linear), gptq_config(4, 64, dynamic=rules))
    assert_equal(read_packed(tmp_path, slot_of(linear)), linear.weight)


def test_tensors_decide_although_dynamic_skips(tmp_path: Path) -> None:
    linear = random_linear(128, 32, 64)
    write_folder(tmp_path, gptq_tensors(MODULE, linear), gptq_config(dynamic={"-:.*": {}}))
    assert_equal(read_packed(tmp_path, slot_of(linear)), linear.weight)


# The head and biases


def test_a_quantized_head(tmp_path: Path) -> None:
    linear = random_linear(64, 96, 32)
    write_folder(tmp_path, gptq_tensors("lm_head", linear), gptq_config(group_size=32, lm_head=True))
    source = open_checked(tmp_path, [slot_of(linear, "lm_head")])
    assert source.has_linear("lm_head")
    assert not source.has_linear(MODULE)
    assert_equal(source.read_linear(slot_of(linear, "lm_head")), linear.weight)


@pytest.mark.parametrize("quantized", [True, False])
def test_biases(tmp_path: Path, quantized: bool) -> None:
    linear = random_linear(64, 32, 32)
    dense = {f"{MODULE}.weight": torch.randn(32, 64).half()}
    tensors = gptq_tensors(MODULE, linear) if quantized else {**dense, **gptq_tensors("lm_head", linear)}
    others = [] if quantized else [slot_of(linear, "lm_head")]
    config = gptq_config(group_size=32)

    def bias_of(folder: str, bias: torch.Tensor, expected_by_model: bool) -> torch.Tensor | None:
        path = write_folder(tmp_path / folder, {**tensors, f"{MODULE}.bias": bias}, config)
        slot = slot_of(linear, has_bias=expected_by_model)
        return open_checked(path, [slot, *others]).read_linear(slot).bias

    value = torch.randn(32).half()
    required, unexpected = bias_of("a", value, True), bias_of("b", value, False)
    assert required is not None
    assert torch.equal(required, value)
    assert unexpected is not None, "a bias that is not zero changes the result and must be kept"
    assert torch.equal(unexpected, value)
    assert bias_of("c", torch.zeros(32).half(), False) is None
    zero = bias_of("d", torch.zeros(32).half(), True)
    assert zero is not None
    assert not zero.any()
    path = write_folder(tmp_path / "e", tensors, config)
    assert f"{MODULE}.bias" in refusal(path, [slot_of(linear, has_bias=True), *others])


# Where the declaration is


def asymmetric(bits: int = 4) -> Quantized:
    return random_linear(96, 32, 48, bits=bits)


def test_declared_in_quantize_config_alone(tmp_path: Path) -> None:
    linear = asymmetric()
    write_folder(tmp_path, gptq_tensors(MODULE, linear, "v2"))
    write_json(tmp_path / "quantize_config.json", gptq_config(4, 48, checkpoint_format="gptq_v2"))
    source = open_checkpoint(tmp_path)
    assert source.quantization == "gptq"
    assert_equal(read_packed(tmp_path, slot_of(linear)), linear.weight)


def test_an_old_quantize_config_means_symmetric_v1(tmp_path: Path, warnings: pytest.LogCaptureFixture) -> None:
    linear = random_linear(96, 32, 48, symmetric=True)
    write_folder(tmp_path, gptq_tensors(MODULE, linear))
    write_json(tmp_path / "quantize_config.json", {"bits": 4, "group_size": 48, "desc_act": False})
    weight = read_packed(tmp_path, slot_of(linear))
    assert weight.zero_const == 8
    assert_equal(weight, linear.weight)
    assert not warnings.records


def test_declared_in_the_metadata_of_the_weights(tmp_path: Path) -> None:
    linear = random_linear(96, 32, 48)
    metadata = {
        "gptq_bits": "4",
        "gptq_group_size": "48",
        "gptq_desc_act": "False",
        "gptq_sym": "False",
        "gptq_checkpoint_format": "gptq_v2",
    }
    write_folder(tmp_path, gptq_tensors(MODULE, linear, "v2"), metadata=metadata)
    assert open_checkpoint(tmp_path).quantization == "gptq"
    assert_equal(read_packed(tmp_path, slot_of(linear)), linear.weight)


def test_config_json_comes_first(tmp_path: Path) -> None:
    linear = asymmetric()
    write_folder(tmp_path, gptq_tensors(MODULE, linear), gptq_config(4, 48))
    write_json(tmp_path / "quantize_config.json", gptq_config(4, 64, checkpoint_format="gptq_v2"))
    assert_equal(read_packed(tmp_path, slot_of(linear)), linear.weight)


def test_keys_in_upper_case_and_synonyms(tmp_path: Path) -> None:
    linear = asymmetric(bits=8)
    config = {"QUANT_METHOD": "GPTQ", "W_BIT": 8, "Q_GROUP_SIZE": 48, "Sym": False, "Format": "GPTQ_V2", "unknown": {}}
    write_folder(tmp_path, gptq_tensors(MODULE, linear, "v2"), config)
    assert_equal(read_packed(tmp_path, slot_of(linear)), linear.weight)


def test_gptqmodel_writes_method(tmp_path: Path) -> None:
    linear = asymmetric()
    config = {"method": "gptq", "format": "gptq", "bits": 4, "group_size": 48, "sym": False}
    write_folder(tmp_path, gptq_tensors(MODULE, linear), config)
    assert open_checkpoint(tmp_path).quantization == "gptq"
    assert_equal(read_packed(tmp_path, slot_of(linear)), linear.weight)


def test_auto_round_with_gptq_tensors(tmp_path: Path) -> None:
    linear = asymmetric()
    config = gptq_config(4, 48, quant_method="auto-round", packing_format="auto_round:auto_gptq")
    write_folder(tmp_path, gptq_tensors(MODULE, linear), config)
    assert open_checkpoint(tmp_path).quantization == "gptq"
    assert_equal(read_packed(tmp_path, slot_of(linear)), linear.weight)


@pytest.mark.parametrize("where", ["config.json", "quantize_config.json"])
def test_the_weight_file_of_a_given_name(tmp_path: Path, where: str) -> None:
    """With several safetensors and no index, AutoGPTQ's model_file_base_name tells which one counts."""
    linear = asymmetric()
    config = gptq_config(4, 48, model_file_base_name="gptq_model-4bit-48g")
    inside = config if where == "config.json" else None
    write_folder(tmp_path, gptq_tensors(MODULE, linear), inside, file="gptq_model-4bit-48g.safetensors")
    if where != "config.json":
        write_json(tmp_path / where, config)
    save_file({"other": torch.zeros(1)}, tmp_path / "adapter.safetensors")
    assert_equal(read_packed(tmp_path, slot_of(linear)), linear.weight)


def test_parts_of_a_layer_in_different_shards(tmp_path: Path) -> None:
    linear = asymmetric()
    tensors = gptq_tensors(MODULE, linear)
    write_folder(tmp_path, {}, gptq_config(4, 48))
    (tmp_path / "model.safetensors").unlink()
    shards = {name: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, name in enumerate(tensors)}
    for shard in set(shards.values()):
        save_file({name: tensors[name].contiguous() for name in tensors if shards[name] == shard}, tmp_path / shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    assert_equal(read_packed(tmp_path, slot_of(linear)), linear.weight)


def test_the_description_names_what_matters(tmp_path: Path) -> None:
    linear = random_linear(128, 32, 32).with_groups(np.random.default_rng(6).permutation(np.arange(128) // 32))
    write_folder(tmp_path, gptq_tensors(MODULE, linear), gptq_config(4, 32, desc_act=True, sym=True))
    description = open_checkpoint(tmp_path).description
    for part in ("GPTQ", "4-bit", "32", "symmetric", "act-order"):
        assert part in description


def test_a_plain_checkpoint_is_not_quantized(tmp_path: Path) -> None:
    dense = torch.randn(32, 64, dtype=torch.bfloat16)
    write_folder(tmp_path, {f"{MODULE}.weight": dense})
    source = open_checked(tmp_path, [LinearSlot(MODULE, 64, 32)])
    assert source.quantization is None
    weight = source.read_linear(LinearSlot(MODULE, 64, 32))
    assert isinstance(weight, DenseWeight)
    assert torch.equal(weight.weight, dense)
