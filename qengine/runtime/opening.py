"""A model as its headers describe it: found, recognized, and compared with its architecture; no weight is read.

What `qengine plan` looks at, and what the loader begins with. Invariant: whatever comes out of here can be loaded, as
far as headers tell. Imports no torch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.dummy_headers import DummyHeaders, read_declared
from converters.errors import CheckpointError
from converters.files import read_json_object
from converters.open_headers import open_headers
from converters.source import HeaderSource, LinearSlot, Slot, TensorSlot
from qengine.config import LoadConfig, ModelConfig
from qengine.errors import ConfigError, LoadError, RequestError
from qengine.models.registry import find_spec
from qengine.models.shapes import HEAD, LinearShape, TensorShape, mlp_linears, slots
from qengine.models.spec import read_model_config, read_token_ids
from qengine.parallel.split import TPSplit, split_model
from qengine.request import SamplingParams
from qengine.runtime.locate import ModelLocation, locate_model
from quant_kernels.footprint import WeightFacts

logger = logging.getLogger(__name__)

#: generation_config.json keys that become sampling defaults.
_SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class OpenedHeaders:
    """A checkpoint whose headers have been checked against the architecture."""

    location: ModelLocation
    source: HeaderSource
    config: ModelConfig
    tied: bool
    eos_token_ids: frozenset[int]
    default_sampling: Mapping[str, Any]

    def facts(self, shape: LinearShape) -> WeightFacts:
        """What a linear of the architecture will be read as, as far as headers tell.

        Raises:
            LoadError: if it does not fit the architecture, which has been checked.
        """
        with load_errors(self.location):
            return self.source.linear_facts(linear_slot(shape))


def split_opened(opened: OpenedHeaders, num_ranks: int, weights: Sequence[float] | None = None) -> TPSplit:
    """What each of `num_ranks` tensor-parallel ranks owns of a model: the same for planner, loader and workers.

    Args:
        weights: how much each rank can take, in any unit; None for alike.

    Raises:
        ConfigError: if the model cannot be split like that, with the reason.
    """
    downs = [mlp_linears(opened.config, layer)[-1] for layer in range(opened.config.num_layers)]
    facts = [opened.facts(down) for down in downs]
    groups = {None if fact.bits is None else fact.group_size for fact in facts}
    return split_model(opened.config, num_ranks, down_groups=groups, weights=weights)


@contextmanager
def load_errors(location: ModelLocation) -> Iterator[None]:
    """What is wrong with a file, or with the config in it, as a LoadError."""
    try:
        yield
    except CheckpointError as error:
        raise LoadError(str(error)) from error
    except ConfigError as error:
        raise LoadError(f"{location.path}: {error}") from error


def open_model_headers(load: LoadConfig) -> OpenedHeaders:
    """Locate and open the model, and check every tensor's name, shape and type.

    Raises:
        LoadError: with all that is wrong.
    """
    location = locate_model(load)
    with load_errors(location):
        source = _open_source(location, load)
    return check_source(location, source, load)


def _open_source(location: ModelLocation, load: LoadConfig) -> HeaderSource:
    if load.load_format == "dummy":
        declared = read_declared(location.path, load.quantization, bits=load.bits, group_size=load.group_size)
        return DummyHeaders(str(location.path), declared.config, declared.scheme)
    return open_headers(location.path, load.quantization)


def check_source(location: ModelLocation, source: HeaderSource, load: LoadConfig) -> OpenedHeaders:
    """Compare an opened checkpoint with the architecture that it names.

    Raises:
        LoadError: with all that is wrong.
    """
    with load_errors(location):
        config = read_model_config(source.config, find_spec(source.config))
        tied = not source.has_linear(HEAD)
        if tied and not config.tie_word_embeddings:
            # Published files get this flag wrong both ways, so the tensors decide.
            logger.warning("%s has no lm_head although it is not tied: using the embedding's weights", location.path)
        source.check([slot_of(shape) for shape in slots(config, tied=tied)])
    own = _read_generation_config(location.path, "auto")
    eos = config.eos_token_ids | read_token_ids(own.get("eos_token_id"))
    chosen = own if load.generation_config == "auto" else _read_generation_config(location.path, load.generation_config)
    return OpenedHeaders(location, source, config, tied, eos, _sampling_defaults(chosen))


def slot_of(shape: LinearShape | TensorShape) -> Slot:
    """A shape of the architecture as converters ask for it."""
    return TensorSlot(shape.name, shape.shape) if isinstance(shape, TensorShape) else linear_slot(shape)


def linear_slot(shape: LinearShape) -> LinearSlot:
    """What a checkpoint is asked for."""
    return LinearSlot(shape.name, shape.in_features, shape.out_features, shape.has_bias)


def _read_generation_config(path: Path, choice: str) -> Mapping[str, Any]:
    """generation_config.json of the model ("auto"), of another folder, or nothing ("none", "vllm", "qengine")."""
    if choice in ("none", "vllm", "qengine"):
        return {}
    folder = path if choice == "auto" else Path(choice).expanduser()
    file = folder if folder.suffix == ".json" else folder / "generation_config.json"
    try:
        if not file.is_file():
            if choice != "auto":
                raise LoadError(f"no generation_config.json at '{choice}'")
            return {}
        return read_json_object(file)
    except OSError as error:  # a link to a name that is too long, or into a folder that may not be read
        raise LoadError(f"cannot look for {file}: {error.strerror}") from error
    except CheckpointError as error:
        raise LoadError(str(error)) from error


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
