"""Kinds of linears: equal exactly where headers and configs say that two are read alike, and known without data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import quantize

from converters.dummy_source import DummySource
from converters.errors import CheckpointError
from converters.source import LinearKind, LinearSlot, Weight
from quant_kernels.packed_weight import DenseWeight, PackedWeight
from quant_kernels.packing import unpack_codes
from quant_kernels.reference import dequantize
from tests.converters.folders import gptq_config, open_checked, write_folder, write_json
from tests.converters.gguf_files import write_gguf

DOWN = [f"model.layers.{layer}.mlp.down_proj" for layer in range(4)]
SLOTS = [LinearSlot(name, 64, 32) for name in DOWN]


def test_gguf_types_make_kinds(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32)
    types = (Kind.Q4_0, Kind.Q4_1, Kind.F16, Kind.Q4_0)
    tensors = {f"blk.{i}.ffn_down.weight": (quantize(values, kind), kind) for i, kind in enumerate(types)}
    source = open_checked(write_gguf(tmp_path / "m.gguf", tensors), SLOTS)
    kinds = [source.linear_kind(slot) for slot in SLOTS]
    assert [kind.is_dense for kind in kinds] == [False, False, True, False]
    assert len(set(kinds)) == 3
    assert kinds[0] == kinds[3]


def gptq_linear(name: str, *, group: int = 32, order: bool = False) -> dict[str, torch.Tensor]:
    tensors = {
        "qweight": torch.zeros(8, 32, dtype=torch.int32),
        "qzeros": torch.zeros(64 // group, 4, dtype=torch.int32),
        "scales": torch.ones(64 // group, 32, dtype=torch.float16),
    }
    if order:
        tensors["g_idx"] = torch.arange(64, dtype=torch.int32).flip(0) // group
    return {f"{name}.{part}": tensor for part, tensor in tensors.items()}


def test_safetensors_shapes_parts_and_rules_make_kinds(tmp_path: Path) -> None:
    tensors = {
        **gptq_linear(DOWN[0]),
        **gptq_linear(DOWN[1]),
        **gptq_linear(DOWN[2], order=True),
        f"{DOWN[3]}.weight": torch.zeros(32, 64),
    }
    plain = open_checked(write_folder(tmp_path / "plain", tensors, gptq_config(group_size=32)), SLOTS)
    kinds = [plain.linear_kind(slot) for slot in SLOTS]
    assert [kind.is_dense for kind in kinds] == [False, False, False, True]
    assert kinds[0] == kinds[1]
    assert len(set(kinds)) == 3
    # Zero points are decoded by what the config says of the module, so it is a part of the kind.
    rules = gptq_config(group_size=32, dynamic={r"+:model\.layers\.1\.": {"sym": True}})
    ruled = open_checked(write_folder(tmp_path / "ruled", tensors, rules), SLOTS)
    assert ruled.linear_kind(SLOTS[0]) != ruled.linear_kind(SLOTS[1])
    assert ruled.linear_kind(SLOTS[0]) == kinds[0]


def test_a_slot_that_does_not_fit_has_no_kind(tmp_path: Path) -> None:
    source = open_checked(write_folder(tmp_path, {f"{DOWN[0]}.weight": torch.zeros(32, 64)}), SLOTS[:1])
    with pytest.raises(CheckpointError, match="the tensors do not fit"):
        source.linear_kind(LinearSlot(DOWN[0], 64, 33))


def test_dummy_kinds_follow_shape_and_name(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {})
    source = DummySource.open(tmp_path, "gptq", 0)
    slots = [*SLOTS[:2], LinearSlot(DOWN[2], 64, 32, has_bias=True), LinearSlot("lm_head", 64, 32)]
    kinds: list[LinearKind] = [source.linear_kind(slot) for slot in slots]
    assert kinds[0] == kinds[1]
    assert len(set(kinds)) == 3
    assert [kind.is_dense for kind in kinds] == [False, False, False, True]


@pytest.mark.parametrize("quantization", [None, "gptq"])
def test_dummy_weights_depend_on_seed_and_name_alone(tmp_path: Path, quantization: str | None) -> None:
    write_json(tmp_path / "config.json", {"quantization_config": {"group_size": 32}})

    def numbers(order: Sequence[LinearSlot], seed: int = 0) -> dict[str, torch.Tensor]:
        source = DummySource.open(tmp_path, quantization, seed)
        weights = {slot.name: source.read_linear(slot) for slot in order}
        return {name: w.weight if isinstance(w, DenseWeight) else w.codes for name, w in weights.items()}

    forth, back, other = numbers(SLOTS), numbers(SLOTS[::-1]), numbers(SLOTS, seed=1)
    assert all(torch.equal(forth[name], back[name]) for name in forth)
    assert not any(torch.equal(forth[name], other[name]) for name in forth)
    assert not torch.equal(forth[SLOTS[0].name], forth[SLOTS[1].name])


# How dummy weights are quantized


def dummy_linear(folder: Path, declared: dict[str, Any], **options: Any) -> Weight:
    write_json(folder / "config.json", {"quantization_config": declared} if declared else {})
    source = DummySource.open(folder, options.pop("quantization", None), 0, **options)
    source.check([DUMMY_SLOT])
    return source.read_linear(DUMMY_SLOT)


DUMMY_SLOT = LinearSlot("model.layers.0.mlp.down_proj", 256, 64)


@pytest.mark.parametrize(
    ("declared", "options", "bits", "group_size", "has_zeros"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, {}, 4, 32, False),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1, "sym": False}, {}, 8, 256, True),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, {"bits": 8, "group_size": 64}, 8, 64, False),
        ({"quant_method": "awq", "group_size": 32}, {}, 4, 32, True),
        ({"quant_method": "awq", "group_size": 32, "zero_point": False}, {}, 4, 32, False),
        ({"quant_method": "fp8", "group_size": 32}, {"quantization": "gptq"}, 4, 128, False),
        ({}, {"quantization": "gptq", "bits": 3}, 4, 128, False),
    ],
)
def test_dummy_weights_are_quantized_as_asked_or_declared(
    tmp_path: Path, declared: dict[str, Any], options: dict[str, Any], bits: int, group_size: int, has_zeros: bool
) -> None:
    weight = dummy_linear(tmp_path, declared, **options)
    assert isinstance(weight, PackedWeight)
    assert (weight.bits, weight.group_size, weight.zeros is not None) == (bits, group_size, has_zeros)
    # Whatever the bits, activations keep their size: the variance of a weight is 1 / K.
    values = dequantize(weight, torch.float32)
    assert float(values.std()) * 256**0.5 == pytest.approx(1, rel=0.1)


def test_dummy_codes_stay_below_their_bits(tmp_path: Path) -> None:
    weight = dummy_linear(tmp_path, {}, quantization="gptq", bits=3)
    assert isinstance(weight, PackedWeight)
    assert unpack_codes(weight.codes, 4).unique().tolist() == list(range(8))
    assert weight.zero_const == 4


def test_dummy_weights_on_the_meta_device_have_shapes_and_no_bytes(tmp_path: Path) -> None:
    options = {"quantization": "awq", "group_size": 64}
    here = dummy_linear(tmp_path, {}, **options)
    meta = dummy_linear(tmp_path, {}, device=torch.device("meta"), **options)
    assert isinstance(here, PackedWeight)
    assert isinstance(meta, PackedWeight)
    assert meta.codes.is_meta
    assert meta.num_bytes == here.num_bytes


@pytest.mark.parametrize(
    ("declared", "options", "message"),
    [
        ({}, {"group_size": 32}, "need a quantization, awq or gptq"),
        ({}, {"bits": 8}, "need a quantization, awq or gptq"),
        ({}, {"quantization": "awq", "bits": 8}, "bits is 8, but awq weights have 4"),
        ({}, {"quantization": "gptq", "bits": 5}, "bits is 5, but gptq weights have 2 or 3 or 4 or 8"),
        ({}, {"quantization": "gptq", "group_size": 0}, "group_size is 0, expected"),
        ({}, {"quantization": "gptq", "group_size": 96}, "256 inputs do not divide into groups of 96"),
        ({"quant_method": "gptq", "group_size": "128"}, {}, "group_size is 128, expected"),
        ({"quant_method": ["gptq"]}, {}, "makes awq, gptq or unquantized weights"),
        ({"quant_method": "fp8"}, {}, "makes awq, gptq or unquantized weights, not 'fp8'"),
    ],
)
def test_dummy_weights_that_do_not_exist(
    tmp_path: Path, declared: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        dummy_linear(tmp_path, declared, **options)
