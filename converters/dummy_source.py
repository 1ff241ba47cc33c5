"""DummySource: random weights of the right shapes, for trying sizes and speeds without a checkpoint.

Needs a folder with a ``config.json`` and no weights. Quantized as the config says, or as a caller asks. Invariant: a
weight depends on the seed and its name alone, whatever was read before it (each kind of device has random numbers of
its own), and logits stay finite. On the meta device it makes shapes without bytes. Its text is noise by nature.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from converters.dummy_headers import DummyHeaders, DummyScheme, read_declared
from converters.read_ahead import ByteRange, Reader
from converters.source import LinearSlot, Slot, TensorSlot, Weight
from quant_kernels.packed_weight import DenseWeight, PackedWeight

CPU = torch.device("cpu")


class DummySource(DummyHeaders):
    """A WeightSource that makes everything up, on `device`."""

    def __init__(
        self, path: str, config: Mapping[str, Any], scheme: DummyScheme | None, seed: int, device: torch.device = CPU
    ) -> None:
        super().__init__(path, config, scheme)
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
            device: where weights are made: a GPU makes billions in the time that a CPU takes for millions.
            quantization, bits, group_size: as `read_declared`.

        Raises:
            CheckpointError: as `read_declared`.
        """
        declared = read_declared(path, quantization, bits=bits, group_size=group_size)
        return cls(str(path), declared.config, declared.scheme, seed, device)

    def ranges(self, slot: Slot) -> Sequence[ByteRange]:
        """None: nothing is read."""
        return ()

    def read_through(self, reader: Reader) -> DummySource:
        """The same: nothing is read."""
        return self

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
        group, middle = scheme.group(rows), scheme.middle
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
