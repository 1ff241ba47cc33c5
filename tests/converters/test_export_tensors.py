"""What is written in each format, read by an independent program in numpy, is the record bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from converters.export_formats import EXPORT_FORMATS, ExportFormat
from converters.export_tensors import (
    ExportScheme,
    LinearTraits,
    linear_tensors,
    obstacle,
    regroup,
    scheme_of,
)
from quant_kernels.packed_weight import PackedWeight
from quant_kernels.packing import pack_codes
from quant_kernels.reference import dequantize
from tests.converters.folders import (
    MODULE,
    awq_config,
    compressed_config,
    gptq_config,
    read_packed,
    slot_of,
    write_folder,
)
from tests.converters.reference import (
    Floats,
    Quantized,
    awq_weight,
    compressed_weight,
    gptq_weight,
    random_linear,
)

QUANTIZED: tuple[ExportFormat, ...] = ("awq", "gptq", "compressed-tensors")


def record(linear: Quantized, perm: npt.NDArray[np.int64] | None = None) -> PackedWeight:
    """The record of a linear; with `perm`, of one whose row perm[i] is the i-th in order of groups."""
    codes = linear.codes if perm is None else linear.codes[perm]
    middle = 2 ** (linear.bits - 1)
    is_constant = bool((linear.zeros == middle).all())
    return PackedWeight(
        bits=linear.bits,
        codes=pack_codes(torch.from_numpy(codes.copy()), linear.bits),
        scales=linear.scales,
        group_size=int((linear.groups == 0).sum()),
        in_features=linear.in_features,
        out_features=linear.out_features,
        zero_const=middle if is_constant else None,
        zeros=None if is_constant else torch.from_numpy(linear.zeros.astype(np.uint8)),
        perm=None if perm is None else torch.from_numpy(perm.astype(np.int32)),
    )


def read_back(tensors: Mapping[str, torch.Tensor], format: ExportFormat, bits: int) -> Floats:
    parts = {name.removeprefix(MODULE + "."): tensor for name, tensor in tensors.items()}
    if format == "awq":
        return awq_weight(parts["qweight"], parts["qzeros"], parts["scales"])
    if format == "gptq":
        return gptq_weight(parts["qweight"], parts["qzeros"], parts["scales"], parts["g_idx"], bits, "v1")
    return compressed_weight(dict(tensors), MODULE, bits)


def scheme_for(weight: PackedWeight, format: ExportFormat) -> ExportScheme:
    assert obstacle(weight, format) is None
    scheme = scheme_of([LinearTraits.of(MODULE, weight)], format)
    assert isinstance(scheme, ExportScheme)
    return scheme


@pytest.mark.parametrize("format", QUANTIZED)
@pytest.mark.parametrize("group_size", [16, 64, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_an_independent_reader_finds_the_same(
    format: ExportFormat, group_size: int, symmetric: bool, bits: int
) -> None:
    linear = random_linear(192, 96, group_size, bits=bits, symmetric=symmetric)
    weight = record(linear)
    if format == "awq" and bits == 8:
        assert "8 bits" in (obstacle(weight, format) or "")
        return
    tensors = linear_tensors(MODULE, weight, scheme_for(weight, format))
    assert np.array_equal(read_back(tensors, format, bits), linear.weight)


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_an_activation_order_is_written(format: ExportFormat, symmetric: bool) -> None:
    groups = np.random.default_rng(0).permutation(np.arange(128) // 32)
    linear = random_linear(128, 64, 32, symmetric=symmetric).with_groups(groups)
    weight = record(linear, np.argsort(groups, kind="stable"))
    assert np.array_equal(dequantize(weight).numpy(), linear.weight)
    scheme = scheme_for(weight, format)
    assert scheme.has_order
    assert np.array_equal(read_back(linear_tensors(MODULE, weight, scheme), format, 4), linear.weight)


@pytest.mark.parametrize("format", QUANTIZED)
@pytest.mark.parametrize("symmetric", [True, False])
def test_our_own_reader_gives_the_record_back(tmp_path: Path, format: ExportFormat, symmetric: bool) -> None:
    linear = random_linear(128, 64, 32, symmetric=symmetric)
    weight = record(linear)
    config = {
        "awq": awq_config(32),
        "gptq": gptq_config(4, 32, sym=symmetric),
        "compressed-tensors": compressed_config(4, 32, symmetric=symmetric),
    }[format]
    write_folder(tmp_path, linear_tensors(MODULE, weight, scheme_for(weight, format)), config)
    found = read_packed(tmp_path, slot_of(linear))
    assert torch.equal(found.codes, weight.codes)
    assert torch.equal(found.scales, weight.scales)
    assert found.zero_const == weight.zero_const
    assert (found.zeros is None) == (weight.zeros is None)
    assert found.zeros is None or weight.zeros is None or torch.equal(found.zeros, weight.zeros)


def test_groups_of_different_sizes_become_alike() -> None:
    wide, narrow = record(random_linear(192, 32, 96)), record(random_linear(192, 32, 64, seed=1))
    scheme = scheme_of([LinearTraits.of("a", wide), LinearTraits.of("b", narrow)], "awq")
    assert isinstance(scheme, ExportScheme)
    assert scheme.group_size == 32
    for weight in (wide, narrow):
        assert torch.equal(dequantize(regroup(weight, 32)), dequantize(weight))
        tensors = linear_tensors(MODULE, weight, scheme)
        assert len(tensors[f"{MODULE}.scales"]) == 6
        assert np.array_equal(read_back(tensors, "awq", 4), dequantize(weight).numpy())


def test_one_symmetric_linear_among_others_gets_a_table() -> None:
    plain, other = record(random_linear(64, 32, 32, symmetric=True)), record(random_linear(64, 32, 32))
    scheme = scheme_of([LinearTraits.of("a", plain), LinearTraits.of("b", other)], "compressed-tensors")
    assert isinstance(scheme, ExportScheme)
    assert not scheme.symmetric
    tensors = linear_tensors(MODULE, plain, scheme)
    assert f"{MODULE}.weight_zero_point" in tensors
    assert np.array_equal(read_back(tensors, "compressed-tensors", 4), dequantize(plain).numpy())


def test_bfloat16_scales() -> None:
    """Exact in float16 in the range that scales have; what is not is refused, and compressed-tensors keeps the type."""
    linear = random_linear(64, 32, 32, dtype=torch.bfloat16)
    weight = record(linear)
    tensors = linear_tensors(MODULE, weight, scheme_for(weight, "gptq"))
    assert np.array_equal(read_back(tensors, "gptq", 4), linear.weight)
    weight.scales[0, 0] = 1e-9
    assert "float16" in (obstacle(weight, "gptq") or "")
    assert obstacle(weight, "compressed-tensors") is None
    tensors = linear_tensors(MODULE, weight, scheme_for(weight, "compressed-tensors"))
    assert tensors[f"{MODULE}.weight_scale"].dtype == torch.bfloat16
    assert np.array_equal(read_back(tensors, "compressed-tensors", 4), dequantize(weight).numpy())


def test_what_cannot_be_expressed() -> None:
    linear = random_linear(96, 32, 64)
    assert "short" in (obstacle(record(linear), "awq") or "")
    assert obstacle(record(linear), "gptq") is None
    linear.zeros[1, 3] = 0
    assert "zero points of 0" in (obstacle(record(linear), "gptq") or "")
    groups = np.random.default_rng(0).permutation(np.arange(64) // 32)
    ordered = record(random_linear(64, 32, 32), np.argsort(groups, kind="stable"))
    assert "activation order" in (obstacle(ordered, "awq") or "")
    mins = record(random_linear(64, 32, 32))
    mins = PackedWeight(4, mins.codes, mins.scales, 32, 64, 32, mins=mins.scales.clone())
    for format in QUANTIZED:
        assert "minimum" in (obstacle(mins, format) or "")
    assert all(obstacle(weight, "dense") is None for weight in (mins, ordered))
    assert EXPORT_FORMATS[-1] == "dense"


def test_bits_must_agree() -> None:
    four, eight = record(random_linear(64, 32, 32)), record(random_linear(64, 32, 32, bits=8))
    reason = scheme_of([LinearTraits.of("a", four), LinearTraits.of("b", eight)], "gptq")
    assert isinstance(reason, str)
    assert "4 and 8 bits" in reason


def test_dense_is_rounded_once() -> None:
    linear = random_linear(64, 32, 32)
    tensors = linear_tensors(MODULE, record(linear), None, torch.float16)
    assert torch.equal(tensors[f"{MODULE}.weight"], torch.from_numpy(linear.weight.T).half())
