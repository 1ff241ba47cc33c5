"""Small checkpoint folders written by tests, and the way they are read back: open, check, read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save_file

from converters.errors import CheckpointError
from converters.open import open_checkpoint
from converters.source import LinearSlot, Slot, TensorSlot, Weight, WeightSource
from quant_kernels.packed_weight import DenseWeight, PackedWeight
from quant_kernels.reference import dequantize
from tests.converters.reference import Floats, Quantized

MODULE = "model.layers.0.mlp.down_proj"


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def write_folder(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    quantization: Mapping[str, Any] | None = None,
    *,
    file: str = "model.safetensors",
    metadata: dict[str, str] | None = None,
) -> Path:
    """config.json with this quantization_config, and one file of tensors. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    write_json(folder / "config.json", config)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file, metadata=metadata)
    return folder


def gptq_config(bits: int = 4, group_size: int = 64, **more: Any) -> dict[str, Any]:
    """An asymmetric v1 declaration, changed by `more`."""
    config = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": False, "sym": False}
    return {**config, "checkpoint_format": "gptq", **more}


def awq_config(group_size: int = 64, **more: Any) -> dict[str, Any]:
    """A GEMM declaration with zero points, changed by `more`."""
    config = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}
    return {**config, **more}


def slot_of(linear: Quantized, name: str = MODULE, *, has_bias: bool = False) -> LinearSlot:
    return LinearSlot(name, linear.in_features, linear.out_features, has_bias)


def open_checked(path: Path, slots: Sequence[Slot]) -> WeightSource:
    source = open_checkpoint(path)
    source.check(slots)
    return source


def read_linear(path: Path, slot: LinearSlot) -> Weight:
    return open_checked(path, [slot]).read_linear(slot)


def read_packed(path: Path, slot: LinearSlot) -> PackedWeight:
    weight = read_linear(path, slot)
    assert isinstance(weight, PackedWeight)
    return weight


def read_everything(path: Path, slots: Sequence[Slot], quantization: str | None = None) -> None:
    source = open_checkpoint(path, quantization)
    source.check(slots)
    for slot in slots:
        if isinstance(slot, TensorSlot):
            source.read_tensor(slot)
        else:
            source.read_linear(slot)


def refusal(path: Path, slots: Sequence[Slot] = (), quantization: str | None = None) -> str:
    """The message with which opening, checking or reading fails, as one of them must."""
    with pytest.raises(CheckpointError) as caught:
        read_everything(path, slots, quantization)
    return str(caught.value)


def natural(weight: Weight) -> Floats:
    """float32 [K, N], rows in the layer's own order."""
    if isinstance(weight, DenseWeight):
        return weight.weight.float().t().numpy()
    return dequantize(weight).numpy()


def assert_equal(weight: Weight, expected: npt.NDArray[Any]) -> None:
    """The weights are exactly the expected float32 [K, N]."""
    found = natural(weight)
    assert found.shape == expected.shape
    assert np.array_equal(found, expected)


def compressed_config(bits: int = 4, group_size: int = 64, *, symmetric: bool = False, **more: Any) -> dict[str, Any]:
    """One group for all linears but the head, changed by `more` (of the weights' own entry)."""
    strategy = {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, **strategy, **more}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
