"""Skeleton: an architecture as transformers builds it, without weights: its parts by name, and single layers to fill.

Everything is made on the meta device, so that a model of any size takes no memory; one decoder layer at a time gets
real weights. Invariant: the class is one of a short list and comes from transformers itself, never from the checkpoint;
the slots are exactly the parameters that the class has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from converters.errors import CheckpointError
from converters.files import shown
from converters.late import import_transformers
from converters.source import HeaderSource, LinearSlot, Slot, TensorSlot

HEAD = "lm_head"
EMBEDDING = "model.embed_tokens"
_LAYERS = "model.layers"
#: Architectures whose decoder is embed_tokens, layers, norm and a head; all that the engine serves are.
MODEL_TYPES: Mapping[str, str] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_FACTORS = "rope_freq_factors"
_QUANTIZATION_KEYS = ("quantization_config", "compression_config")
#: Llama 3.1's rope scaling, which GGUF stores as its result alone.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


#: As many as any model has, for transformers builds what it is told to, layer by layer.
_MOST = {"num_hidden_layers": 2**12, "vocab_size": 2**24} | dict.fromkeys(
    ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"), 2**20
)


class Skeleton:
    """An architecture by its config.json.

    Attributes:
        config: transformers' config object.
        num_layers: decoder layers.

    Raises:
        CheckpointError: if the architecture is none of ours, or transformers cannot build it.
    """

    def __init__(self, raw: Mapping[str, Any], path: str) -> None:
        names = raw.get("architectures")
        name = next((n for n in names if n in MODEL_TYPES), None) if isinstance(names, list) else None
        if name is None:
            known = ", ".join(MODEL_TYPES)
            raise CheckpointError(f"{path}: architecture {shown(names)} is not supported; supported: {known}")
        _check_sizes(raw, path)
        transformers = import_transformers()
        self._factors = raw.get(_FACTORS)
        try:
            values = {**plain_config(raw), "model_type": MODEL_TYPES[name]}
            self.config: Any = transformers.AutoConfig.for_model(**values)
            with torch.device("meta"):
                self._model: Any = getattr(transformers, name)._from_config(self.config, attn_implementation="sdpa")
        except Exception as error:
            raise CheckpointError(f"{path}: transformers cannot build this model: {shown(error)}") from error
        self._model.eval()
        self.num_layers = len(self._model.model.layers)

    # Slots

    def before(self) -> list[Slot]:
        """The embedding."""
        return _slots(self._model.model.embed_tokens, EMBEDDING)

    def layer(self, index: int) -> list[Slot]:
        """One decoder layer."""
        return _slots(self._model.model.layers[index], layer_name(index))

    def after(self, *, tied: bool) -> list[Slot]:
        """The last norm, and the head unless it is the embedding."""
        norm = _slots(self._model.model.norm, "model.norm")
        return norm if tied else [*norm, *_slots(self._model.lm_head, HEAD)]

    def sections(self, *, tied: bool) -> Iterator[list[Slot]]:
        """All slots: what is before the layers, each layer, and what is after them."""
        yield self.before()
        for index in range(self.num_layers):
            yield self.layer(index)
        yield self.after(tied=tied)

    def slots(self, *, tied: bool) -> list[Slot]:
        """All slots in one list."""
        return [slot for section in self.sections(tied=tied) for slot in section]

    # Running a part

    def empty_layer(self, index: int) -> nn.Module:
        """The modules of a decoder layer, on the meta device; give it weights with ``load_state_dict(assign=True)``."""
        layer: nn.Module = self._model.model.layers[index]
        return layer

    def empty_end(self) -> tuple[nn.Module, nn.Linear]:
        """The last norm and the head, on the meta device."""
        return self._model.model.norm, self._model.lm_head

    def window(self, index: int) -> int | None:
        """Positions that a layer attends to, None for all."""
        window: int | None = getattr(self.config, "sliding_window", None)
        types = getattr(self.config, "layer_types", None)
        if types is not None:
            return window if types[index] == "sliding_attention" else None
        return window

    def rotary(self, device: torch.device) -> nn.Module:
        """The module that makes cosines and sines: called with a tensor and positions [1, T]."""
        module: Any = type(self._model.model.rotary_emb)(self.config)
        if self._factors is not None:
            module.inv_freq = module.inv_freq / torch.tensor(self._factors, dtype=torch.float32)
        placed: nn.Module = module.to(device)
        return placed

    def exported_config(self, raw: Mapping[str, Any], path: str) -> dict[str, Any]:
        """config.json of the same model without its quantization, in keys that transformers knows.

        Raises:
            CheckpointError: if its rope scaling is one that no such key can say.
        """
        config = plain_config(raw)
        if self._factors is not None:
            config["rope_scaling"] = _llama3_scaling(self._factors, self.rotary_base(), path)
        return config

    def rotary_base(self) -> torch.Tensor:
        """Inverse frequencies before any scaling, float32 [head_dim / 2]."""
        frequencies: torch.Tensor = type(self._model.model.rotary_emb)(self.config).inv_freq
        return frequencies


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A checkpoint whose tensors have been compared with its architecture.

    Attributes:
        source: where weights are read from, as a `HeaderSource` or a `WeightSource`.
        tied: the head is the embedding.
    """

    source: HeaderSource
    skeleton: Skeleton
    tied: bool

    @staticmethod
    def check(source: HeaderSource) -> OpenedModel:
        """Raises CheckpointError with all that does not fit."""
        skeleton = Skeleton(source.config, source.path)
        tied = not source.has_linear(HEAD)
        source.check(skeleton.slots(tied=tied))
        return OpenedModel(source, skeleton, tied)


def plain_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without what it says of quantization, and without keys of our own."""
    return {key: value for key, value in raw.items() if key not in (*_QUANTIZATION_KEYS, _FACTORS)}


def layer_name(index: int) -> str:
    """A decoder layer's module name."""
    return f"{_LAYERS}.{index}"


def _check_sizes(raw: Mapping[str, Any], path: str) -> None:
    for key, most in _MOST.items():
        value = raw.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most):
            what = shown(repr(value) if isinstance(value, str) else value)
            raise CheckpointError(f"{path}: {key} is {what}, expected a whole number from 1 to {most}")


def _slots(module: nn.Module, prefix: str) -> list[Slot]:
    slots: list[Slot] = []
    for name, part in module.named_modules(prefix=prefix):
        if isinstance(part, nn.Linear):
            slots.append(LinearSlot(name, part.in_features, part.out_features, part.bias is not None))
        else:
            own = part.named_parameters(recurse=False)
            slots += [TensorSlot(f"{name}.{kind}", tuple(tensor.shape)) for kind, tensor in own]
    return slots


def _llama3_scaling(factors: Sequence[float], frequencies: torch.Tensor, path: str) -> dict[str, Any]:
    """The parameters that give these divisors, if they are Llama 3.1's."""
    factor = max(factors)
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    turns = frequencies.double() * _LLAMA3["original_max_position_embeddings"] / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    divisors = 1 / ((1 - smooth) / factor + smooth)
    if not torch.allclose(divisors, torch.tensor(factors, dtype=torch.float64), rtol=1e-4):
        raise CheckpointError(
            f"{path}: its rope factors are not Llama 3.1's, and config.json has no way to say others; they can be run "
            "from the GGUF file only"
        )
    return {"rope_type": "llama3", "factor": round(factor, 4), **_LLAMA3}
