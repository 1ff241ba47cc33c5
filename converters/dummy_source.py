"""DummySource: random weights of the right shapes, for trying sizes and speeds without a checkpoint.

Needs a folder with a ``config.json`` and a tokenizer, but no weights. Quantized as the config says, or as
`quantization` asks (4 bits, group 128). Invariant: a weight depends on the seed and its name alone, whatever was read
before it (each kind of device has random numbers of its own), and logits stay finite. Its text is noise by nature.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from converters.errors import CheckpointError
from converters.files import read_json_object
from converters.source import LinearKind, LinearSlot, Slot, TensorSlot, Weight
from quant_kernels.packed_weight import DenseWeight, PackedWeight

_EMBEDDING = "model.embed_tokens"
CPU = torch.device("cpu")


class DummySource:
    """A WeightSource that makes everything up, on `device`. Unquantized parts are bfloat16."""

    def __init__(
        self,
        path: str,
        config: Mapping[str, Any],
        quantization: str | None,
        group_size: int,
        seed: int,
        device: torch.device = CPU,
    ) -> None:
        self.path = path
        self.config = config
        self.quantization = quantization
        self._group_size = group_size
        self._seed = seed
        self._device = device
        kind = f"{quantization.upper()} 4-bit, group {group_size}" if quantization else "unquantized bfloat16"
        self.description = f"dummy weights, {kind}"

    @classmethod
    def open(cls, path: Path, quantization: str | None, seed: int, device: torch.device = CPU) -> DummySource:
        """Read the folder's config.json.

        Args:
            device: where weights are made: a GPU makes billions in the time that a CPU takes for millions.

        Raises:
            CheckpointError: if there is none, or it is no JSON object.
        """
        if not (path / "config.json").is_file():
            raise CheckpointError(f"load_format dummy needs a folder with a config.json, found none in {path}")
        config = read_json_object(path / "config.json")
        declared = config.get("quantization_config")
        declared = declared if isinstance(declared, dict) else {}
        method = quantization or declared.get("quant_method")
        group_size = declared.get("group_size", 128)
        if method not in (None, "awq", "gptq") or not isinstance(group_size, int):
            raise CheckpointError(f"load_format dummy makes awq, gptq or unquantized weights, not '{method}'")
        return cls(str(path), config, method, group_size, seed, device)

    def has_linear(self, name: str) -> bool:
        """A head of its own exists unless the config ties it."""
        return not (name == "lm_head" and self.config.get("tie_word_embeddings", False))

    def check(self, slots: Sequence[Slot]) -> None:
        """Every slot exists by construction; a quantized one must divide into groups and words."""
        for slot in slots:
            if isinstance(slot, LinearSlot) and self._is_quantized(slot.name):
                group = self._group(slot.in_features)
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

    def read_tensor(self, slot: TensorSlot) -> torch.Tensor:
        """Norm weights of one, embeddings of unit variance."""
        if len(slot.shape) == 1:
            return torch.ones(slot.shape, dtype=torch.bfloat16, device=self._device)
        return self._normal(slot.name, slot.shape)

    def read_linear(self, slot: LinearSlot) -> Weight:
        """Weights with a standard deviation of 1 / sqrt(K)."""
        rows, columns = slot.in_features, slot.out_features
        bias = torch.zeros(columns, dtype=torch.bfloat16, device=self._device) if slot.has_bias else None
        if not self._is_quantized(slot.name):
            weight = self._normal(f"{slot.name}.weight", (columns, rows))
            return DenseWeight(weight.mul_(rows**-0.5), bias)
        group = self._group(rows)
        words, random = (rows // 8, columns), self._random(slot.name)
        codes = torch.randint(-(2**31), 2**31 - 1, words, generator=random, dtype=torch.int32, device=self._device)
        # Uniform codes around 8 have a standard deviation of 4.6.
        scales = torch.full((rows // group, columns), rows**-0.5 / 4.6, dtype=torch.float16, device=self._device)
        return PackedWeight(4, codes, scales, group, rows, columns, zero_const=8, bias=bias)

    def _normal(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=self._random(name), dtype=torch.bfloat16, device=self._device)

    def _random(self, name: str) -> torch.Generator:
        """Random numbers of this name's own."""
        digest = hashlib.blake2b(f"{self._seed}:{name}".encode(), digest_size=8).digest()
        return torch.Generator(self._device).manual_seed(int.from_bytes(digest, "little") >> 1)

    def _is_quantized(self, name: str) -> bool:
        return self.quantization is not None and name not in ("lm_head", _EMBEDDING)

    def _group(self, in_features: int) -> int:
        return in_features if self._group_size == -1 else self._group_size
