"""DummySource: random weights of the right shapes, for trying sizes and speeds without a checkpoint.

Needs a folder with a ``config.json`` and a tokenizer, but no weights. Quantized as the config says, or as
`quantization` asks (4 bits, group 128). Invariant: a weight depends on the seed and its name alone, whatever was read
before it (each kind of device has random numbers of its own), and logits stay finite. Its text is noise by nature.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from converters.dummy_headers import BITS, ZERO_POINT, DummyHeaders, read_declared
from converters.source import LinearSlot, TensorSlot, Weight
from quant_kernels.packed_weight import DenseWeight, PackedWeight

CPU = torch.device("cpu")


class DummySource(DummyHeaders):
    """A WeightSource that makes everything up, on `device`."""

    def __init__(
        self,
        path: str,
        config: Mapping[str, Any],
        quantization: str | None,
        group_size: int,
        seed: int,
        device: torch.device = CPU,
    ) -> None:
        super().__init__(path, config, quantization, group_size)
        self._seed = seed
        self._device = device

    @classmethod
    def open(cls, path: Path, quantization: str | None, seed: int, device: torch.device = CPU) -> DummySource:
        """Read the folder's config.json.

        Args:
            device: where weights are made: a GPU makes billions in the time that a CPU takes for millions.

        Raises:
            CheckpointError: as `read_declared`.
        """
        declared = read_declared(path, quantization)
        return cls(str(path), declared.config, declared.quantization, declared.group_size, seed, device)

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
        group = self.group(rows)
        words, random = (rows // 8, columns), self._random(slot.name)
        codes = torch.randint(-(2**31), 2**31 - 1, words, generator=random, dtype=torch.int32, device=self._device)
        # Uniform codes around 8 have a standard deviation of 4.6.
        scales = torch.full((rows // group, columns), rows**-0.5 / 4.6, dtype=torch.float16, device=self._device)
        return PackedWeight(BITS, codes, scales, group, rows, columns, zero_const=ZERO_POINT, bias=bias)

    def _normal(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=self._random(name), dtype=torch.bfloat16, device=self._device)

    def _random(self, name: str) -> torch.Generator:
        """Random numbers of this name's own."""
        digest = hashlib.blake2b(f"{self._seed}:{name}".encode(), digest_size=8).digest()
        return torch.Generator(self._device).manual_seed(int.from_bytes(digest, "little") >> 1)
