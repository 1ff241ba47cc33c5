"""transformers with the very weights that qengine runs: the judge of logits, and the peer of serving.

A model is made in its dtype on the device and filled from the same source, quantized weights expanded. Nothing is
downloaded and nothing is read from a disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers

from benchmarks.gpu.models import Config
from converters.source import LinearSlot, TensorSlot
from qengine.models.shapes import LinearShape, slots
from qengine.runtime.loader import OpenedModel
from quant_kernels.reference import to_dense


def transformers_model(config: Config, opened: OpenedModel, dtype: torch.dtype, device: torch.device) -> Any:
    """A causal model of transformers with the weights of `opened.source`, in `dtype`."""
    family = config["architectures"][0]
    values = {key: value for key, value in config.items() if key not in ("architectures", "model_type")}
    settings = getattr(transformers, family.replace("ForCausalLM", "Config"))(**values)
    settings._attn_implementation = "sdpa"
    with made_as(dtype, device):
        model = getattr(transformers, family)(settings).eval()
    _fill(model, opened)
    return model


@torch.no_grad()
def _fill(model: Any, opened: OpenedModel) -> None:
    for shape in slots(opened.config, tied=opened.tied):
        if isinstance(shape, LinearShape):
            slot = LinearSlot(shape.name, shape.in_features, shape.out_features, shape.has_bias)
            dense = to_dense(opened.source.read_linear(slot), torch.float32)
            model.get_parameter(f"{shape.name}.weight").copy_(dense.weight)
            if dense.bias is not None:
                model.get_parameter(f"{shape.name}.bias").copy_(dense.bias)
        else:
            model.get_parameter(shape.name).copy_(opened.source.read_tensor(TensorSlot(shape.name, shape.shape)))


@contextmanager
def made_as(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Parameters that are made inside have this dtype and device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)
