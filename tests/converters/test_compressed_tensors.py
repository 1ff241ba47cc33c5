"""compressed-tensors, format pack-quantized: read bit by bit, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from converters.open_headers import open_headers
from tests.converters.folders import (
    MODULE,
    assert_equal,
    compressed_config,
    natural,
    read_packed,
    refusal,
    slot_of,
    write_folder,
)
from tests.converters.reference import Quantized, compressed_tensors, random_linear


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_are_exact(tmp_path: Path, bits: int, group_size: int, symmetric: bool) -> None:
    linear = random_linear(128, 48, group_size, bits=bits, symmetric=symmetric, dtype=torch.bfloat16)
    tensors = compressed_tensors(MODULE, linear, with_zeros=not symmetric)
    write_folder(tmp_path, tensors, compressed_config(bits, group_size, symmetric=symmetric))
    weight = read_packed(tmp_path, slot_of(linear))
    assert_equal(weight, linear.weight)
    assert weight.scales.dtype == torch.bfloat16
    assert (weight.zero_const == 2 ** (bits - 1)) == symmetric


def test_worked_example(tmp_path: Path) -> None:
    """Words computed by hand from the published layout."""
    rows, columns = np.arange(16)[:, None], np.arange(8)[None]
    zeros = np.array([[8, 7, 6, 5, 9, 10, 11, 4], [1, 2, 3, 12, 13, 14, 15, 8]])
    scales = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 4, 3, 2, 1]]).half() / 16
    linear = Quantized(4, (3 * rows + 5 * columns + 1) % 16, zeros, scales, np.arange(16) // 8)
    tensors = compressed_tensors(MODULE, linear)
    assert [f"{w & 0xFFFFFFFF:08X}" for w in tensors[f"{MODULE}.weight_packed"][0].tolist()] == ["630DA741", "EB852FC9"]
    assert [f"{w & 0xFFFFFFFF:08X}" for w in tensors[f"{MODULE}.weight_zero_point"][0].tolist()] == [
        "4BA95678",
        "8FEDC321",
    ]
    write_folder(tmp_path, tensors, compressed_config(4, 8))
    weight = natural(read_packed(tmp_path, slot_of(linear)))
    assert weight[0].tolist() == [-0.4375, -0.125, 0.9375, -1.25, -1.25, 0, 1.75, 0]
    assert weight[8].tolist() == [4, 5.25, 0, -1.25, 0, -2.25, -1, 0.25]


@pytest.mark.parametrize("symmetric", [True, False])
def test_an_activation_order(tmp_path: Path, symmetric: bool) -> None:
    groups = np.random.default_rng(0).permutation(np.arange(128) // 32)
    linear = random_linear(128, 32, 32, symmetric=symmetric).with_groups(groups)
    tensors = compressed_tensors(MODULE, linear, g_idx=groups, with_zeros=not symmetric)
    write_folder(tmp_path, tensors, compressed_config(4, 32, symmetric=symmetric, actorder="group"))
    weight = read_packed(tmp_path, slot_of(linear))
    assert weight.perm is not None
    assert_equal(weight, linear.weight)
    headers = open_headers(tmp_path, "compressed-tensors")
    assert headers.linear_facts(slot_of(linear)).has_order
    assert headers.description.endswith("act-order")


def test_an_order_that_was_never_set_is_none(tmp_path: Path) -> None:
    linear = random_linear(128, 32, 32)
    tensors = compressed_tensors(MODULE, linear, g_idx=np.full(128, -1))
    write_folder(tmp_path, tensors, compressed_config(4, 32))
    weight = read_packed(tmp_path, slot_of(linear))
    assert weight.perm is None
    assert_equal(weight, linear.weight)


def test_zero_points_of_a_symmetric_model_do_not_count(tmp_path: Path) -> None:
    linear = random_linear(64, 32, 32, symmetric=True)
    tensors = compressed_tensors(MODULE, linear)
    tensors[f"{MODULE}.weight_zero_point"].zero_()
    write_folder(tmp_path, tensors, compressed_config(4, 32, symmetric=True))
    assert_equal(read_packed(tmp_path, slot_of(linear)), linear.weight)


def test_outputs_that_do_not_fill_a_word_of_zero_points(tmp_path: Path) -> None:
    linear = random_linear(64, 12, 32)
    write_folder(tmp_path, compressed_tensors(MODULE, linear), compressed_config(4, 32))
    assert_equal(read_packed(tmp_path, slot_of(linear)), linear.weight)


@pytest.mark.parametrize("target", ["re:.*down_proj$", MODULE])
def test_groups_by_pattern_and_by_name(tmp_path: Path, target: str) -> None:
    """The general group says symmetric; the particular one says that there are zero points."""
    linear = random_linear(64, 32, 16)
    config = compressed_config(4, 32, symmetric=True)
    particular = compressed_config(4, 16)["config_groups"]["group_0"]
    config["config_groups"]["group_1"] = {**particular, "targets": [target]}
    write_folder(tmp_path, compressed_tensors(MODULE, linear), config)
    assert_equal(read_packed(tmp_path, slot_of(linear)), linear.weight)


def _with(**weights: Any) -> dict[str, Any]:
    return compressed_config(4, 32, **weights)


def _group(**changes: Any) -> dict[str, Any]:
    config = compressed_config(4, 32)
    config["config_groups"]["group_0"].update(changes)
    return config


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another format": ({**compressed_config(), "format": "float-quantized"}, "float-quantized"),
    "a group's own format": (_group(format="nvfp4-pack-quantized"), "nvfp4"),
    "no groups": ({**compressed_config(), "config_groups": None}, "config_groups"),
    "a preset": ({**compressed_config(), "config_groups": {"W4A16": ["Linear"]}}, "presets"),
    "activations": (_group(input_activations={"num_bits": 8}), "activations"),
    "floats": (_with(type="float"), "float"),
    "one scale in all": (_with(strategy="tensor"), "tensor"),
    "two bits": (_with(num_bits=2), "2"),
    "sparse": ({**compressed_config(), "sparsity_config": {"format": "sparse-24"}}, "sparsity_config"),
    "rotated": ({**compressed_config(), "transform_config": {"config_groups": {"a": 1}}}, "transform_config"),
    "a costly pattern": (_group(targets=["re:(a+)+$"]), "costly"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused(tmp_path: Path, case: str) -> None:
    config, word = REFUSED[case]
    linear = random_linear(64, 32, 32)
    write_folder(tmp_path, compressed_tensors(MODULE, linear), config)
    assert word in refusal(tmp_path, [slot_of(linear)])


@pytest.mark.parametrize("part", ["weight_scale", "weight_zero_point"])
def test_a_missing_part_is_named(tmp_path: Path, part: str) -> None:
    linear = random_linear(64, 32, 32)
    tensors = compressed_tensors(MODULE, linear)
    del tensors[f"{MODULE}.{part}"]
    write_folder(tmp_path, tensors, compressed_config(4, 32))
    message = refusal(tmp_path, [slot_of(linear)])
    assert "missing" in message
    assert part in message


def test_a_shape_that_is_another_layers(tmp_path: Path) -> None:
    linear = random_linear(64, 32, 32)
    tensors = compressed_tensors(MODULE, linear) | {f"{MODULE}.weight_shape": torch.tensor([64, 32])}
    write_folder(tmp_path, tensors, compressed_config(4, 32))
    assert "weight_shape" in refusal(tmp_path, [slot_of(linear)])


def test_declared_but_not_packed(tmp_path: Path) -> None:
    write_folder(tmp_path, {f"{MODULE}.weight": torch.zeros(32, 64)}, compressed_config())
    assert "weight_packed" in refusal(tmp_path)
