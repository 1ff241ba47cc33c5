"""DummyHeaders: the weights that a folder with a ``config.json`` would have, as a HeaderSource. Without torch.

Quantized as the config says, or as the caller asks: 4 bits, groups of 128 where nobody says. Invariant: it describes
exactly what `dummy_source` makes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError
from converters.files import read_json_object, shown
from converters.source import LinearKind, LinearSlot, Slot
from quant_kernels.footprint import WeightFacts

EMBEDDING = "model.embed_tokens"
BITS, ZERO_POINT = 4, 8
_GROUP_SIZE = 128


@dataclass(frozen=True, slots=True)
class Declared:
    """A folder's config, and how its weights are to be quantized: "awq", "gptq" or None."""

    config: Mapping[str, Any]
    quantization: str | None
    group_size: int


def read_declared(path: Path, quantization: str | None = None, group_size: int | None = None) -> Declared:
    """Read the folder's config.json; `quantization` and `group_size` take the place of what it says.

    Raises:
        CheckpointError: if there is none, or it asks for something else than 4 bits.
    """
    if not (path / "config.json").is_file():
        raise CheckpointError(f"load_format dummy needs a folder with a config.json, found none in {path}")
    config = read_json_object(path / "config.json")
    found = config.get("quantization_config")
    found = found if isinstance(found, dict) and quantization in (None, found.get("quant_method", quantization)) else {}
    method = quantization or found.get("quant_method")
    if method not in (None, "awq", "gptq"):
        raise CheckpointError(f"load_format dummy makes awq, gptq or unquantized weights, not '{shown(method)}'")
    bits = found.get("bits", BITS)
    if bits != BITS:
        raise CheckpointError(
            f"load_format dummy makes weights of 4 bits, but {path / 'config.json'} says {shown(bits)}"
        )
    size = group_size if group_size is not None else found.get("group_size", _GROUP_SIZE)
    if isinstance(size, bool) or not isinstance(size, int) or (size != -1 and size < 1):
        raise CheckpointError(f"group_size is {shown(size)}, expected a whole number above zero, or -1 for one group")
    return Declared(config, method, size)


class DummyHeaders:
    """A HeaderSource of weights that nobody has. Unquantized parts are bfloat16."""

    def __init__(self, path: str, config: Mapping[str, Any], quantization: str | None, group_size: int) -> None:
        self.path = path
        self.config = config
        self.quantization = quantization
        self._group_size = group_size
        group = "one group per channel" if group_size == -1 else f"group {group_size}"
        kind = f"{quantization.upper()} 4-bit, {group}" if quantization else "unquantized bfloat16"
        self.description = f"dummy weights, {kind}"

    @classmethod
    def of_folder(cls, path: Path, quantization: str | None, group_size: int | None = None) -> DummyHeaders:
        """What the folder's config.json describes.

        Raises:
            CheckpointError: as `read_declared`.
        """
        declared = read_declared(path, quantization, group_size)
        return cls(str(path), declared.config, declared.quantization, declared.group_size)

    def has_linear(self, name: str) -> bool:
        """A head of its own exists unless the config ties it."""
        return not (name == "lm_head" and self.config.get("tie_word_embeddings", False))

    def check(self, slots: Sequence[Slot]) -> None:
        """Every slot exists by construction; a quantized one must divide into groups and words."""
        for slot in slots:
            if isinstance(slot, LinearSlot) and self._is_quantized(slot.name):
                group = self.group(slot.in_features)
                if slot.in_features % group or slot.in_features % 8:
                    raise CheckpointError(
                        f"{slot.name}: {slot.in_features} inputs do not divide into groups of {group}"
                    )

    def linear_kind(self, slot: LinearSlot) -> LinearKind:
        """All linears that are quantized alike and have the same shape are of one kind."""
        is_dense = not self._is_quantized(slot.name)
        weight = ("weight", "BF16" if is_dense else "4 bits", (slot.out_features, slot.in_features))
        bias = ("bias", "BF16", (slot.out_features,))
        return LinearKind((weight, bias) if slot.has_bias else (weight,), is_dense)

    def linear_facts(self, slot: LinearSlot) -> WeightFacts:
        """What the linear is made as."""
        bias_dtype = "bfloat16" if slot.has_bias else None
        if not self._is_quantized(slot.name):
            return WeightFacts(slot.in_features, slot.out_features, bias_dtype=bias_dtype)
        return WeightFacts(
            slot.in_features,
            slot.out_features,
            bits=BITS,
            group_size=self.group(slot.in_features),
            zero_const=ZERO_POINT,
            bias_dtype=bias_dtype,
        )

    def group(self, in_features: int) -> int:
        """Inputs that share a scale."""
        return in_features if self._group_size == -1 else self._group_size

    def _is_quantized(self, name: str) -> bool:
        return self.quantization is not None and name not in ("lm_head", EMBEDDING)
