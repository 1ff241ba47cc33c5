"""AWQ folders in the GEMM layout, written by the test, read back exactly."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from converters.open import open_checkpoint
from converters.source import LinearSlot
from quant_kernels.packed_weight import DenseWeight
from tests.converters.folders import (
    MODULE,
    assert_equal,
    awq_config,
    open_checked,
    read_packed,
    refusal,
    slot_of,
    write_folder,
    write_json,
)
from tests.converters.reference import Quantized, awq_tensors, random_linear


def full_range(in_features: int, out_features: int, group_size: int, **more: Any) -> Quantized:
    """AWQ stores zero points as they are, so 0 is one like any other."""
    linear = random_linear(in_features, out_features, group_size, **more)
    zeros = np.random.default_rng(9).integers(0, 16, linear.zeros.shape)
    return Quantized(4, linear.codes, zeros, linear.scales, linear.groups)


@pytest.mark.parametrize("group_size", [16, 32, 64, 128, -1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_group_sizes(tmp_path: Path, caplog: pytest.LogCaptureFixture, group_size: int, dtype: torch.dtype) -> None:
    linear = full_range(256, 24, group_size, dtype=dtype)
    write_folder(tmp_path, awq_tensors(MODULE, linear), awq_config(group_size))
    with caplog.at_level(logging.WARNING):
        weight = read_packed(tmp_path, slot_of(linear))
    assert weight.scales.dtype == dtype
    assert weight.group_size == (256 if group_size == -1 else group_size)
    assert_equal(weight, linear.weight)
    assert open_checkpoint(tmp_path).quantization == "awq"
    assert not caplog.records


def test_without_qzeros_the_middle_code_is_zero(tmp_path: Path) -> None:
    linear = random_linear(128, 16, 64, symmetric=True)
    tensors = awq_tensors(MODULE, linear)
    del tensors[f"{MODULE}.qzeros"]
    write_folder(tmp_path, tensors, awq_config(zero_point=False))
    weight = read_packed(tmp_path, slot_of(linear))
    assert weight.zero_const == 8
    assert_equal(weight, linear.weight)


def test_modules_to_not_convert(tmp_path: Path) -> None:
    """Entries are parts of names; a module that they name is plain, and one with packed tensors is packed anyway."""
    linear = full_range(128, 16, 64)
    gate = "model.layers.0.mlp.gate_proj"
    dense = torch.randn(16, 128).half()
    tensors = {**awq_tensors(MODULE, linear), f"{gate}.weight": dense}
    write_folder(tmp_path, tensors, awq_config(modules_to_not_convert=["gate", "layers.0.mlp.down"]))
    slots = [slot_of(linear), LinearSlot(gate, 128, 16)]
    source = open_checked(tmp_path, slots)
    assert_equal(source.read_linear(slots[0]), linear.weight)
    plain = source.read_linear(slots[1])
    assert isinstance(plain, DenseWeight)
    assert torch.equal(plain.weight, dense)


@pytest.mark.parametrize("value", [[], None])
def test_no_modules_to_not_convert(tmp_path: Path, value: list[str] | None) -> None:
    linear = full_range(128, 16, 64)
    write_folder(tmp_path, awq_tensors(MODULE, linear), awq_config(modules_to_not_convert=value))
    assert_equal(read_packed(tmp_path, slot_of(linear)), linear.weight)


@pytest.mark.parametrize("version", ["gemm", "GEMM", "exllama", None])
def test_versions_with_this_layout(tmp_path: Path, version: str | None) -> None:
    linear = full_range(128, 16, 64)
    write_folder(tmp_path, awq_tensors(MODULE, linear), awq_config(version=version))
    assert_equal(read_packed(tmp_path, slot_of(linear)), linear.weight)


def test_autoawq_config_of_its_own(tmp_path: Path) -> None:
    linear = full_range(128, 16, 64)
    write_folder(tmp_path, awq_tensors(MODULE, linear))
    old = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM", "modules_to_not_convert": ["visual"]}
    write_json(tmp_path / "quant_config.json", old)
    assert open_checkpoint(tmp_path).quantization == "awq"
    assert_equal(read_packed(tmp_path, slot_of(linear)), linear.weight)


def test_gptqmodel_and_auto_round_write_awq_too(tmp_path: Path) -> None:
    linear = full_range(128, 16, 64)
    configs = {
        "gptqmodel": {"quant_method": "awq", "method": "awq", "format": "gemm", "checkpoint_format": "gemm"},
        "autoround": {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"},
    }
    for name, config in configs.items():
        folder = write_folder(
            tmp_path / name, awq_tensors(MODULE, linear), {"bits": 4, "group_size": 64, "sym": False, **config}
        )
        assert open_checkpoint(folder).quantization == "awq"
        assert_equal(read_packed(folder, slot_of(linear)), linear.weight)


def test_bias(tmp_path: Path) -> None:
    linear, bias = full_range(128, 16, 64), torch.randn(16).half()
    write_folder(tmp_path, {**awq_tensors(MODULE, linear), f"{MODULE}.bias": bias}, awq_config())
    weight = read_packed(tmp_path, slot_of(linear, has_bias=True))
    assert weight.bias is not None
    assert torch.equal(weight.bias, bias)
    write_folder(tmp_path, awq_tensors(MODULE, linear), awq_config())
    assert f"{MODULE}.bias" in refusal(tmp_path, [slot_of(linear, has_bias=True)])


def test_the_last_group_cannot_be_short(tmp_path: Path) -> None:
    """160 rows in three groups: legal in GPTQ, but no AWQ writer makes it."""
    linear = full_range(160, 16, 64)
    write_folder(tmp_path, awq_tensors(MODULE, linear), awq_config(64))
    assert MODULE in refusal(tmp_path, [slot_of(linear)])
