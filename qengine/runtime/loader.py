"""From a checkpoint to a decoder in memory: open, check everything, then read.

`open_model` looks at headers alone and refuses whatever cannot be loaded; `load_decoder` then reads one layer after the
other. Invariant: no weight is read and no device memory taken before the whole file is known to fit the model.
The only place, with the planner, where qengine meets converters.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from converters.dummy_source import DummySource
from converters.errors import CheckpointError
from converters.open import open_checkpoint
from converters.read_ahead import ReadAhead
from converters.source import LinearKind, LinearSlot, Slot, TensorSlot, WeightSource
from qengine.config import LoadConfig, ModelConfig
from qengine.errors import ConfigError, LoadError, RequestError
from qengine.layers.linear import Weight
from qengine.models.decoder import Decoder, Materials, build
from qengine.models.registry import find_spec
from qengine.models.shapes import EMBEDDING, HEAD, LinearShape, TensorShape, slots
from qengine.models.spec import read_model_config, read_token_ids
from qengine.request import SamplingParams
from qengine.runtime.locate import ModelLocation, locate_model
from quant_kernels.linear.dispatch import Target
from quant_kernels.packed_weight import DenseWeight

logger = logging.getLogger(__name__)

#: generation_config.json keys that become sampling defaults.
_SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A checkpoint whose headers have been checked against the architecture; no weight is read yet."""

    location: ModelLocation
    source: WeightSource
    config: ModelConfig
    tied: bool
    eos_token_ids: frozenset[int]
    default_sampling: Mapping[str, Any]

    @property
    def gguf_metadata(self) -> Mapping[str, Any] | None:
        """The file's metadata when it is GGUF: the tokenizer is made from it."""
        metadata: Mapping[str, Any] | None = getattr(self.source, "metadata", None)
        return metadata


@contextmanager
def _load_errors(location: ModelLocation) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise LoadError(str(error)) from error
    except ConfigError as error:
        raise LoadError(f"{location.path}: {error}") from error


def open_model(load: LoadConfig) -> OpenedModel:
    """Locate and open the model, and check every tensor's name, shape and type.

    Raises:
        LoadError: with all that is wrong, before any weight is read.
    """
    location = locate_model(load)
    with _load_errors(location):
        source = _open_source(location, load)
        config = read_model_config(source.config, find_spec(source.config))
        tied = not source.has_linear(HEAD)
        if tied and not config.tie_word_embeddings:
            # Published files get this flag wrong both ways, so the tensors decide.
            logger.warning("%s has no lm_head although it is not tied: using the embedding's weights", location.path)
        source.check([_slot(shape) for shape in slots(config, tied=tied)])
    own = _read_generation_config(location.path, "auto")
    eos = config.eos_token_ids | read_token_ids(own.get("eos_token_id"))
    chosen = own if load.generation_config == "auto" else _read_generation_config(location.path, load.generation_config)
    return OpenedModel(location, source, config, tied, eos, _sampling_defaults(chosen))


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


def load_decoder(opened: OpenedModel, target: Target, max_position: int, *, show_progress: bool = False) -> Decoder:
    """Read the weights and lay them out for the device.

    Raises:
        LoadError: if the data itself is bad (scales that are not finite, a file cut short).
    """
    return load_timed(opened, target, max_position, show_progress=show_progress)[0]


def load_timed(
    opened: OpenedModel, target: Target, max_position: int, *, show_progress: bool = False
) -> tuple[Decoder, LoadTimes]:
    """The same, and what it took. A thread reads ahead while this one converts.

    Raises:
        LoadError: as `load_decoder`.
    """
    started = time.perf_counter()
    wanted = [_slot(shape) for shape in slots(opened.config, tied=opened.tied)]
    ranges = [part for slot in wanted for part in opened.source.ranges(slot)]
    total = sum(part.num_bytes for part in ranges)
    with (
        _load_errors(opened.location),
        _progress_bar(total, len(wanted), shown=show_progress) as bar,
        ReadAhead(ranges) as reader,
    ):
        source = opened.source.read_through(reader)

        def read_tensor(shape: TensorShape) -> torch.Tensor:
            tensor = source.read_tensor(TensorSlot(shape.name, shape.shape))
            bar.update(reader.times.num_bytes - bar.n if total else 1)
            return tensor

        def read_linear(shape: LinearShape) -> Weight:
            if shape.name == EMBEDDING and linear_kind(opened, shape).is_dense:
                # The head is the embedding, whose table is in memory: `build` takes that one.
                return DenseWeight(torch.empty(shape.out_features, shape.in_features, device="meta"))
            weight = source.read_linear(_linear_slot(shape))
            bar.update(reader.times.num_bytes - bar.n if total else 1)
            return weight

        materials = Materials(read_tensor, read_linear, target)
        decoder = build(opened.config, materials, tied=opened.tied, max_position=max_position)
    seconds = time.perf_counter() - started
    times = reader.times
    return decoder, LoadTimes(times.num_bytes, seconds, times.busy_seconds, seconds - times.waited_seconds)


def _progress_bar(num_bytes: int, num_weights: int, *, shown: bool) -> tqdm[NoReturn]:
    """Bytes with their rate; weights where there are no bytes to read."""
    unit = (
        {"total": num_bytes, "unit": "B", "unit_scale": True}
        if num_bytes
        else {"total": num_weights, "unit": " weights"}
    )
    return tqdm(desc="Loading weights", disable=not shown, leave=False, **unit)


def linear_kind(opened: OpenedModel, shape: LinearShape) -> LinearKind:
    """How a linear is stored, by the headers: two of one kind are read alike.

    Raises:
        LoadError: if it does not fit the architecture, which `open_model` has checked.
    """
    with _load_errors(opened.location):
        return opened.source.linear_kind(_linear_slot(shape))


def sketch_linear(opened: OpenedModel, shape: LinearShape) -> Weight:
    """A linear with all that choosing a kernel needs, and its codes or weights on the meta device.

    Raises:
        LoadError: if the data itself is bad.
    """
    empty = DenseWeight(torch.empty(shape.out_features, shape.in_features, device="meta"))
    if linear_kind(opened, shape).is_dense:
        return empty
    with _load_errors(opened.location):
        weight = opened.source.read_linear(_linear_slot(shape))
    return empty if isinstance(weight, DenseWeight) else replace(weight, codes=weight.codes.to("meta"))


def _slot(shape: LinearShape | TensorShape) -> Slot:
    return TensorSlot(shape.name, shape.shape) if isinstance(shape, TensorShape) else _linear_slot(shape)


def _linear_slot(shape: LinearShape) -> LinearSlot:
    return LinearSlot(shape.name, shape.in_features, shape.out_features, shape.has_bias)


def _read_generation_config(path: Path, choice: str) -> Mapping[str, Any]:
    """generation_config.json of the model ("auto"), of another folder, or nothing ("none", "vllm", "qengine")."""
    if choice in ("none", "vllm", "qengine"):
        return {}
    folder = path if choice == "auto" else Path(choice).expanduser()
    file = folder if folder.suffix == ".json" else folder / "generation_config.json"
    if not file.is_file():
        if choice != "auto":
            raise LoadError(f"no generation_config.json at '{choice}'")
        return {}
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"{file} is not readable as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise LoadError(f"{file} holds {type(raw).__name__}, expected an object")
    return raw


def _sampling_defaults(generation: Mapping[str, Any]) -> Mapping[str, Any]:
    if generation.get("do_sample") is False:
        return {}
    defaults: dict[str, Any] = {}
    for name in _SAMPLING_KEYS:
        value = generation.get(name)
        if value is None:
            continue
        try:
            SamplingParams(**{name: value})
        except RequestError as error:
            logger.warning("generation_config.json is ignored where it is wrong: %s", error)
            continue
        defaults[name] = value
    return defaults
