"""DummySource: random weights of the right shapes, for trying sizes and speeds without a checkpoint.

Needs a folder with a ``config.json`` and no weights. Quantized as the config says, or as a caller asks. Invariant: a
weight depends on the seed and its name alone, whatever was read before it (each kind of device has random numbers of
its own), and logits stay finite. On the meta device it makes shapes without bytes. Its text is noise by nature.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from converters.errors import CheckpointError
from converters.files import read_json_object, shown
from converters.source import LinearKind, LinearSlot, Slot, TensorSlot, Weight
from quant_kernels.packed_weight import DenseWeight, PackedWeight

_EMBEDDING = "model.embed_tokens"
CPU = torch.device("cpu")
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
    def description(self) -> str:
        """One line for people."""
        group = "per channel" if self.group_size == -1 else f"group {self.group_size}"
        return f"{self.method.upper()} {self.bits}-bit, {group}"


class DummySource:
    """A WeightSource that makes everything up, on `device`. Unquantized parts are bfloat16."""

    def __init__(
        self, path: str, config: Mapping[str, Any], scheme: DummyScheme | None, seed: int, device: torch.device = CPU
    ) -> None:
        self.path = path
        self.config = config
        self.quantization = scheme.method if scheme else None
        self.description = f"dummy weights, {scheme.description if scheme else 'unquantized bfloat16'}"
        self._scheme = scheme
        self._seed = seed
        self._device = device

    @classmethod
    def open(
        cls,
        path: Path,
        quantization: str | None,
        seed: int,
        device: torch.device = CPU,
        *,
        bits: int | None = None,
        group_size: int | None = None,
    ) -> DummySource:
        """Read the folder's config.json.

        Args:
            quantization: "awq" or "gptq"; None takes what the config says.
            device: where weights are made: a GPU makes billions in the time that a CPU takes for millions.
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
            given = {"bits": bits, "group_size": group_size}
            return cls(str(path), config, _scheme(method, declared, given), seed, device)
        if bits is not None or group_size is not None:
            raise CheckpointError("bits and group_size need a quantization, awq or gptq: these weights have none")
        return cls(str(path), config, None, seed, device)

    def has_linear(self, name: str) -> bool:
        """A head of its own exists unless the config ties it."""
        return not (name == "lm_head" and self.config.get("tie_word_embeddings", False))

    def check(self, slots: Sequence[Slot]) -> None:
        """Every slot exists by construction; a quantized one must divide into groups and words."""
        for slot in slots:
            scheme = self._scheme_of(slot.name)
            if isinstance(slot, LinearSlot) and scheme is not None:
                group = _group(scheme, slot)
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

    def read_tensor(self, slot: TensorSlot) -> torch.Tensor:
        """Norm weights of one, embeddings of unit variance."""
        if len(slot.shape) == 1:
            return torch.ones(slot.shape, dtype=torch.bfloat16, device=self._device)
        return self._normal(slot.name, slot.shape)

    def read_linear(self, slot: LinearSlot) -> Weight:
        """Weights with a standard deviation of 1 / sqrt(K)."""
        rows, columns = slot.in_features, slot.out_features
        bias = torch.zeros(columns, dtype=torch.bfloat16, device=self._device) if slot.has_bias else None
        scheme = self._scheme_of(slot.name)
        if scheme is None:
            weight = self._normal(f"{slot.name}.weight", (columns, rows))
            return DenseWeight(weight.mul_(rows**-0.5), bias)
        group, middle = _group(scheme, slot), 2 ** (scheme.bits - 1)
        # Uniform codes of b bits have a standard deviation of sqrt((4^b - 1) / 12): 4.6 for 4 bits.
        scale = rows**-0.5 / math.sqrt((4**scheme.bits - 1) / 12)
        table = (-(-rows // group), columns)
        zeros = torch.full(table, middle, dtype=torch.uint8, device=self._device) if scheme.has_zeros else None
        return PackedWeight(
            bits=scheme.stored_bits,
            codes=self._codes(slot.name, scheme, (rows * scheme.stored_bits // 32, columns)),
            scales=torch.full(table, scale, dtype=torch.float16, device=self._device),
            group_size=group,
            in_features=rows,
            out_features=columns,
            zero_const=None if scheme.has_zeros else middle,
            zeros=zeros,
            bias=bias,
        )

    def _codes(self, name: str, scheme: DummyScheme, words: tuple[int, int]) -> torch.Tensor:
        """int32 [K * stored_bits / 32, N], every code below 2**bits."""
        random, device = self._random(name), self._device
        codes = torch.randint(-(2**31), 2**31 - 1, words, generator=random, dtype=torch.int32, device=device)
        if scheme.bits < scheme.stored_bits:
            codes &= sum((2**scheme.bits - 1) << shift for shift in range(0, 32, scheme.stored_bits))
        return codes

    def _normal(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=self._random(name), dtype=torch.bfloat16, device=self._device)

    def _random(self, name: str) -> torch.Generator | None:
        """Random numbers of this name's own; None where there are none to make."""
        if self._device.type == "meta":
            return None
        digest = hashlib.blake2b(f"{self._seed}:{name}".encode(), digest_size=8).digest()
        return torch.Generator(self._device).manual_seed(int.from_bytes(digest, "little") >> 1)

    def _scheme_of(self, name: str) -> DummyScheme | None:
        return None if name in ("lm_head", _EMBEDDING) else self._scheme


def _group(scheme: DummyScheme, slot: LinearSlot) -> int:
    return slot.in_features if scheme.group_size == -1 else scheme.group_size


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
