"""From a checkpoint to a decoder in memory: open, check everything, then read.

`open_model` looks at headers alone and refuses whatever cannot be loaded; `load_decoder` then reads one layer after the
other. Invariant: no weight is read and no device memory taken before the whole file is known to fit the model.
The only place, with `opening`, where qengine meets converters.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from converters.dummy_source import DummySource
from converters.manifest import Manifest
from converters.open import open_checkpoint
from converters.read_ahead import ReadAhead
from converters.source import LinearKind, TensorSlot, WeightSource
from qengine.config import LoadConfig
from qengine.layers.linear import Weight
from qengine.models.decoder import Decoder, Materials, build
from qengine.models.shapes import EMBEDDING, LinearShape, TensorShape, slots
from qengine.parallel.group import TPGroup
from qengine.runtime.locate import ModelLocation, locate_model
from qengine.runtime.opening import OpenedHeaders, check_source, linear_slot, load_errors, slot_of
from quant_kernels.linear.dispatch import Target
from quant_kernels.packed_weight import DenseWeight

logger = logging.getLogger(__name__)


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


def verify_files(opened: OpenedModel, load: LoadConfig, *, show_progress: bool = False) -> None:
    """Compare the model's files with its manifest, if that was asked for. Reads all of them.

    Raises:
        LoadError: if it has no manifest, or a file is not what the manifest says.
    """
    if not load.verify:
        return
    with load_errors(opened.location):
        manifest = Manifest.read(opened.location.path)
        with _progress_bar(manifest.num_bytes, 0, shown=show_progress, what="Verifying files") as bar:
            manifest.check(lambda num_bytes: bar.update(num_bytes) and None)
    logger.info("%s: all %d files are what manifest.json says", opened.location.name, len(manifest.files))


def _open_source(location: ModelLocation, load: LoadConfig) -> WeightSource:
    if load.load_format == "dummy":
        return DummySource.open(location.path, load.quantization, load.seed, bits=load.bits, group_size=load.group_size)
    return open_checkpoint(location.path, load.quantization)


@dataclass(frozen=True, slots=True)
class LoadTimes:
    """What loading took. Reading and converting overlap, so that their seconds do not add up to those of the whole.

    Attributes:
        num_bytes: that were read.
        seconds: of everything.
        read_seconds: that the reading thread was busy.
        convert_seconds: that the converting thread was busy: it did not wait for bytes.
    """

    num_bytes: int
    seconds: float
    read_seconds: float
    convert_seconds: float


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
        layers: of this pipeline stage; None for all.

    Raises:
        LoadError: if the data itself is bad (scales that are not finite, a file cut short).
    """
    return load_timed(opened, target, max_position, group=group, layers=layers, show_progress=show_progress)[0]


def load_timed(
    opened: OpenedModel,
    target: Target,
    max_position: int,
    *,
    group: TPGroup | None = None,
    layers: range | None = None,
    show_progress: bool = False,
) -> tuple[Decoder, LoadTimes]:
    """The same, and what it took. A thread reads ahead while this one converts.

    Raises:
        LoadError: as `load_decoder`.
    """
    started = time.perf_counter()
    has_table = layers is None or layers.start == 0
    wanted = [slot_of(shape) for shape in slots(opened.config, tied=opened.tied, layers=layers)]
    ranges = [part for slot in wanted for part in opened.source.ranges(slot)]
    total = sum(part.num_bytes for part in ranges)
    with (
        load_errors(opened.location),
        _one_thread_less(),
        _progress_bar(total, len(wanted), shown=show_progress) as bar,
        ReadAhead(ranges) as reader,
    ):
        source = opened.source.read_through(reader)

        def read_tensor(shape: TensorShape) -> torch.Tensor:
            tensor = source.read_tensor(TensorSlot(shape.name, shape.shape))
            bar.update(reader.times.num_bytes - bar.n if total else 1)
            return tensor

        def read_linear(shape: LinearShape) -> Weight:
            if shape.name == EMBEDDING and has_table and linear_kind(opened, shape).is_dense:
                # The head is the embedding, whose table is in memory: `build` takes that one.
                return DenseWeight(torch.empty(shape.out_features, shape.in_features, device="meta"))
            weight = source.read_linear(linear_slot(shape))
            bar.update(reader.times.num_bytes - bar.n if total else 1)
            return weight

        materials = Materials(read_tensor, read_linear, target)
        decoder = build(
            opened.config, materials, tied=opened.tied, max_position=max_position, group=group, layers=layers
        )
    seconds = time.perf_counter() - started
    times = reader.times
    return decoder, LoadTimes(times.num_bytes, seconds, times.busy_seconds, seconds - times.waited_seconds)


@contextmanager
def _one_thread_less() -> Iterator[None]:
    """Leave a core to the reading thread: work that is split over all cores waits for the one that is shared."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(max(1, num_threads - 1))
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _progress_bar(num_bytes: int, num_weights: int, *, shown: bool, what: str = "Loading weights") -> tqdm[NoReturn]:
    """Bytes with their rate; weights where there are no bytes to read."""
    unit = (
        {"total": num_bytes, "unit": "B", "unit_scale": True}
        if num_bytes
        else {"total": num_weights, "unit": " weights"}
    )
    return tqdm(desc=what, disable=not shown, leave=False, **unit)


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
