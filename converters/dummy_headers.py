"""DummyHeaders: the weights that a folder with a ``config.json`` would have, as a HeaderSource. Without torch.

Quantized as the config says, or as a caller asks. Invariant: it describes exactly what `dummy_source` makes.
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

_EMBEDDING = "model.embed_tokens"
#: The bits that each method can be asked for.
_BITS = {"awq": (4,), "gptq": (2, 3, 4, 8)}


@dataclass(frozen=True, slots=True)
class DummyScheme:
    """How the linears are quantized. `group_size` -1 is all rows of a layer; `has_zeros`: zero points by group."""

    method: str
    bits: int = 4
    group_size: int = 128
    has_zeros: bool = False

    @property
    def stored_bits(self) -> int:
        """Bits of the record: 2 and 3 widen to 4, as when they are read from a file."""
        return max(4, self.bits)

    @property
    def middle(self) -> int:
        """The zero point."""
        return int(2 ** (self.bits - 1))

    def group(self, in_features: int) -> int:
        """Inputs of a layer that share a scale."""
        return in_features if self.group_size == -1 else self.group_size

    @property
    def description(self) -> str:
        """One line for people."""
        group = "per channel" if self.group_size == -1 else f"group {self.group_size}"
        return f"{self.method.upper()} {self.bits}-bit, {group}"


@dataclass(frozen=True, slots=True)
class Declared:
    """A folder's config.json, and how its weights are to be quantized."""

    config: Mapping[str, Any]
    scheme: DummyScheme | None


def read_declared(
    path: Path, quantization: str | None = None, *, bits: int | None = None, group_size: int | None = None
) -> Declared:
    """Read the folder's config.json.

    Args:
        quantization: "awq" or "gptq"; None takes what the config says.
        bits, group_size: None takes what the config says, else 4 and 128.

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
        return Declared(config, _scheme(method, declared, {"bits": bits, "group_size": group_size}))
    if bits is not None or group_size is not None:
        raise CheckpointError("bits and group_size need a quantization, awq or gptq: these weights have none")
    return Declared(config, None)


class DummyHeaders:
    """A HeaderSource of weights that nobody has. Unquantized parts are bfloat16."""

    def __init__(self, path: str, config: Mapping[str, Any], scheme: DummyScheme | None) -> None:
        self.path = path
        self.config = config
        self.quantization = scheme.method if scheme else None
        self.description = f"dummy weights, {scheme.description if scheme else 'unquantized bfloat16'}"
        self.scheme = scheme

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
        scheme, bias_dtype = self._scheme_of(slot.name), "bfloat16" if slot.has_bias else None
        if scheme is None:
            return WeightFacts(slot.in_features, slot.out_features, bias_dtype=bias_dtype)
        return WeightFacts(
            slot.in_features,
            slot.out_features,
            bits=scheme.stored_bits,
            group_size=scheme.group(slot.in_features),
            zero_const=None if scheme.has_zeros else scheme.middle,
            bias_dtype=bias_dtype,
        )

    def _scheme_of(self, name: str) -> DummyScheme | None:
        """How a linear is quantized; None if it is not."""
        return None if name in ("lm_head", _EMBEDDING) else self.scheme


def _scheme(method: object, declared: Mapping[str, Any], given: Mapping[str, int | None]) -> DummyScheme:
    """What was given, over what the config declares, over the usual."""
    allowed = _BITS.get(method) if isinstance(method, str) else None
    if allowed is None or not isinstance(method, str):
        raise CheckpointError(f"load_format dummy makes awq, gptq or unquantized weights, not '{shown(method)}'")
    # What a config says of another method than the one asked for is not about these weights.
    said = declared if declared.get("quant_method", method) == method else {}
    bits, group_size = (
        value if value is not None else said.get(name, usual)
        for (name, value), usual in zip(given.items(), (4, 128), strict=True)
    )
    if bits not in allowed:
        raise CheckpointError(f"bits is {shown(bits)}, but {method} weights have {' or '.join(map(str, allowed))}")
    is_size = isinstance(group_size, int) and not isinstance(group_size, bool)
    if not is_size or (group_size < 1 and group_size != -1):
        raise CheckpointError(
            f"group_size is {shown(group_size)}, expected a number of rows such as 128, or -1 for all"
        )
    has_zeros = bool(said.get("zero_point", True)) if method == "awq" else said.get("sym", True) is False
    return DummyScheme(method, bits, group_size, has_zeros)
