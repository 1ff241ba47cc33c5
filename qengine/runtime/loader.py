"""From a checkpoint to a decoder in memory: open, check everything, then read.

`open_model` looks at headers alone and refuses whatever cannot be loaded; `load_decoder` then reads one layer after the
other. Invariant: no weight is read and no device memory taken before the whole file is known to fit the model.
The only place, with `opening`, where qengine meets converters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm import tqdm

from converters.dummy_source import DummySource
from converters.open import open_checkpoint
from converters.source import LinearKind, TensorSlot, WeightSource
from qengine.config import LoadConfig
from qengine.layers.linear import Weight
from qengine.models.decoder import Decoder, Materials, build
from qengine.models.shapes import LinearShape, TensorShape, slots
from qengine.parallel.group import TPGroup
from qengine.runtime.locate import ModelLocation, locate_model
from qengine.runtime.opening import OpenedHeaders, check_source, linear_slot, load_errors
from quant_kernels.linear.dispatch import Target
from quant_kernels.packed_weight import DenseWeight


@dataclass(frozen=True, slots=True)
class OpenedModel(OpenedHeaders):
    """The same, with a source whose weights can be read; none is read yet."""

    source: WeightSource

    @property
    def gguf_metadata(self) -> Mapping[str, Any] | None:
        """The file's metadata when it is GGUF: the tokenizer is made from it."""
        metadata: Mapping[str, Any] | None = getattr(self.source, "metadata", None)
        return metadata


def open_model(load: LoadConfig) -> OpenedModel:
    """Locate and open the model, and check every tensor's name, shape and type.

    Raises:
        LoadError: with all that is wrong, before any weight is read.
    """
    location = locate_model(load)
    with load_errors(location):
        source = _open_source(location, load)
    found = check_source(location, source, load)
    return OpenedModel(location, source, found.config, found.tied, found.eos_token_ids, found.default_sampling)


def _open_source(location: ModelLocation, load: LoadConfig) -> WeightSource:
    if load.load_format == "dummy":
        return DummySource.open(location.path, load.quantization, load.seed, bits=load.bits, group_size=load.group_size)
    return open_checkpoint(location.path, load.quantization)


def load_decoder(
    opened: OpenedModel,
    target: Target,
    max_position: int,
    *,
    group: TPGroup | None = None,
    layers: range | None = None,
    show_progress: bool = False,
) -> Decoder:
    """Read the weights and lay them out for the device.

    Args:
        group: of the ranks that share every layer, with `split_opened`'s split; None for this one alone.
        layers: of this pipeline stage, as `stage_layers` says; None for all.

    Raises:
        LoadError: if the data itself is bad (scales that are not finite, a file cut short).
    """
    total = sum(1 for _ in slots(opened.config, tied=opened.tied, layers=layers))
    if opened.tied and (layers is None or layers == range(opened.config.num_layers)):
        total += 1  # The table is read as an embedding and as a head.
    bar = tqdm(total=total, desc="Loading weights", unit=" tensors", disable=not show_progress, leave=False)

    def read_tensor(shape: TensorShape) -> torch.Tensor:
        bar.update()
        return opened.source.read_tensor(TensorSlot(shape.name, shape.shape))

    def read_linear(shape: LinearShape) -> Weight:
        bar.update()
        return opened.source.read_linear(linear_slot(shape))

    with bar, load_errors(opened.location):
        materials = Materials(read_tensor, read_linear, target)
        return build(opened.config, materials, tied=opened.tied, max_position=max_position, group=group, layers=layers)


def linear_kind(opened: OpenedModel, shape: LinearShape) -> LinearKind:
    """How a linear is stored, by the headers: two of one kind are read alike.

    Raises:
        LoadError: if it does not fit the architecture, which `open_model` has checked.
    """
    with load_errors(opened.location):
        return opened.source.linear_kind(linear_slot(shape))


def sketch_linear(opened: OpenedModel, shape: LinearShape) -> Weight:
    """A linear with all that choosing a kernel needs, and its codes or weights on the meta device.

    Raises:
        LoadError: if the data itself is bad.
    """
    empty = DenseWeight(torch.empty(shape.out_features, shape.in_features, device="meta"))
    if linear_kind(opened, shape).is_dense:
        return empty
    with load_errors(opened.location):
        weight = opened.source.read_linear(linear_slot(shape))
    return empty if isinstance(weight, DenseWeight) else replace(weight, codes=weight.codes.to("meta"))
