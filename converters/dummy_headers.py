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
#: The bits that each method can be asked for.
_BITS = {"awq": (4,), "gptq": (2, 3, 4, 8)}
_USUAL_BITS, _USUAL_GROUP = 4, 128


@dataclass(frozen=True, slots=True)
class DummyScheme:
    """How the linears are quantized. `group_size` -1 is all rows of a layer; `has_zeros`: zero points by group."""

    method: str
    bits: int = _USUAL_BITS
    group_size: int = _USUAL_GROUP
    has_zeros: bool = False

    @property
    def stored_bits(self) -> int:
        """Bits of the record: 2 and 3 widen to 4, as when they are read from a file."""
        return max(4, self.bits)

    @property
    def zero_point(self) -> int:
        """The middle of the codes."""
        return int(2 ** (self.bits - 1))

    @property
    def description(self) -> str:
        """One line for people."""
        group = "per channel" if self.group_size == -1 else f"group {self.group_size}"
        return f"{self.method.upper()} {self.bits}-bit, {group}"

    def group(self, in_features: int) -> int:
        """Inputs that share a scale."""
        return in_features if self.group_size == -1 else self.group_size


@dataclass(frozen=True, slots=True)
class Declared:
    """A folder's config, and how its weights are to be quantized; None leaves them as they are."""

    config: Mapping[str, Any]
    scheme: DummyScheme | None


def read_declared(
    path: Path, quantization: str | None = None, group_size: int | None = None, bits: int | None = None
) -> Declared:
    """Read the folder's config.json; what is given takes the place of what it says.

    Raises:
        CheckpointError: if there is no config.json, it is no JSON object, or such weights do not exist.
    """
    if not (path / "config.json").is_file():
        raise CheckpointError(f"load_format dummy needs a folder with a config.json, found none in {path}")
    config = read_json_object(path / "config.json")
    declared = config.get("quantization_config")
    declared = declared if isinstance(declared, dict) else {}
    method = quantization or declared.get("quant_method")
    if method is not None:
        return Declared(config, _scheme(method, declared, bits, group_size))
    if bits is not None or group_size is not None:
        raise CheckpointError("bits and group_size need a quantization, awq or gptq: these weights have none")
    return Declared(config, None)


class DummyHeaders:
    """A HeaderSource of weights that nobody has. Unquantized parts are bfloat16."""

    def __init__(self, path: str, declared: Declared) -> None:
        scheme = declared.scheme
        self.path = path
        self.config = declared.config
        self.quantization = None if scheme is None else scheme.method
        self.description = f"dummy weights, {'unquantized bfloat16' if scheme is None else scheme.description}"
        self._scheme = scheme

    @classmethod
    def of_folder(
        cls, path: Path, quantization: str | None, group_size: int | None = None, bits: int | None = None
    ) -> DummyHeaders:
        """What the folder's config.json describes.

        Raises:
            CheckpointError: as `read_declared`.
        """
        return cls(str(path), read_declared(path, quantization, group_size, bits))

    def has_linear(self, name: str) -> bool:
        """A head of its own exists unless the config ties it."""
        return not (name == "lm_head" and self.config.get("tie_word_embeddings", False))

    def check(self, slots: Sequence[Slot]) -> None:
        """Every slot exists by construction; a quantized one must divide into groups and words."""
        for slot in slots:
            scheme = self._scheme_of(slot.name)
            if isinstance(slot, LinearSlot) and scheme is not None:
                group = scheme.group(slot.in_features)
                if slot.in_features % group or slot.in_features % 8:
                    raise CheckpointError(
                        f"{slot.name}: {slot.in_features} inputs do not divide into groups of {group}"
                    )

    def linear_kind(self, slot: LinearSlot) -> LinearKind:
        """All linears that are quantized alike and have the same shape are of one kind."""
        scheme = self._scheme_of(slot.name)
        dtype = "BF16" if scheme is None else f"{scheme.bits} bits"
        weight = ("weight", dtype, (slot.out_features, slot.in_features))
        bias = ("bias", "BF16", (slot.out_features,))
        return LinearKind((weight, bias) if slot.has_bias else (weight,), scheme is None)

    def linear_facts(self, slot: LinearSlot) -> WeightFacts:
        """What the linear is made as."""
        bias_dtype = "bfloat16" if slot.has_bias else None
        scheme = self._scheme_of(slot.name)
        if scheme is None:
            return WeightFacts(slot.in_features, slot.out_features, bias_dtype=bias_dtype)
        return WeightFacts(
            slot.in_features,
            slot.out_features,
            bits=scheme.stored_bits,
            group_size=scheme.group(slot.in_features),
            zero_const=None if scheme.has_zeros else scheme.zero_point,
            bias_dtype=bias_dtype,
        )

    def _scheme_of(self, name: str) -> DummyScheme | None:
        return None if name in ("lm_head", EMBEDDING) else self._scheme


def _scheme(method: object, declared: Mapping[str, Any], bits: int | None, group_size: int | None) -> DummyScheme:
    """What was given, over what the config declares, over the usual."""
    allowed = _BITS.get(method) if isinstance(method, str) else None
    if allowed is None or not isinstance(method, str):
        raise CheckpointError(f"load_format dummy makes awq, gptq or unquantized weights, not '{shown(method)}'")
    # What a config says of another method than the one asked for is not about these weights.
    said = declared if declared.get("quant_method", method) == method else {}
    width = said.get("bits", _USUAL_BITS) if bits is None else bits
    if width not in allowed:
        raise CheckpointError(f"bits is {shown(width)}, but {method} weights have {' or '.join(map(str, allowed))}")
    size = said.get("group_size", _USUAL_GROUP) if group_size is None else group_size
    if isinstance(size, bool) or not isinstance(size, int) or (size != -1 and size < 1):
        raise CheckpointError(f"group_size is {shown(size)}, expected a number of rows such as 128, or -1 for all")
    has_zeros = bool(said.get("zero_point", True)) if method == "awq" else said.get("sym", True) is False
    return DummyScheme(method, width, size, has_zeros)
