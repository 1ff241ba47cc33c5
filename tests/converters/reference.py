"""The formats once more, in numpy and from their published descriptions alone: what the readers are compared with.

Packed words are treated as one little-endian stream of bits, whatever the width of a code; for 2, 4 and 8 bits that is
the same as fields of a word, for 3 bits it is the format's definition. Nothing here imports converters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

#: Slot i of an AWQ word holds this column of its eight.
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def unpack(words: npt.NDArray[Any], bits: int) -> Ints:
    """Codes along the last axis of 32-bit words."""
    octets = np.ascontiguousarray(words).view(np.uint8)
    stream = np.unpackbits(octets, axis=-1, bitorder="little").reshape(*words.shape[:-1], -1, bits)
    return stream.astype(np.int64) @ (1 << np.arange(bits))


def pack(codes: npt.NDArray[Any], bits: int) -> npt.NDArray[np.int32]:
    """Codes along the last axis to 32-bit words."""
    stream = (codes[..., None].astype(np.int64) >> np.arange(bits)) & 1
    octets = np.packbits(stream.astype(np.uint8).reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")
    return octets.view(np.int32)


def awq_unpack(words: npt.NDArray[Any]) -> Ints:
    """AWQ codes along the last axis."""
    slots = unpack(words, 4).reshape(*words.shape, 8)
    codes = np.empty_like(slots)
    codes[..., AWQ_ORDER] = slots
    return codes.reshape(*words.shape[:-1], -1)


def awq_pack(codes: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """AWQ words along the last axis."""
    return pack(codes.reshape(*codes.shape[:-1], -1, 8)[..., AWQ_ORDER].reshape(codes.shape), 4)


@dataclass(frozen=True)
class Quantized:
    """A linear as numbers: codes [K, N], zero points [G, N], scales [G, N] (as on disk), group of each row [K]."""

    bits: int
    codes: Ints
    zeros: Ints
    scales: torch.Tensor
    groups: Ints

    @property
    def weight(self) -> Floats:
        """float32 [K, N]: an exact integer difference and one rounding."""
        weight: Floats = (self.codes - self.zeros[self.groups]).astype(np.float32)
        weight *= self.scales.float().numpy()[self.groups]
        return weight

    @property
    def in_features(self) -> int:
        return int(self.codes.shape[0])

    @property
    def out_features(self) -> int:
        return int(self.codes.shape[1])

    def with_groups(self, groups: npt.NDArray[Any]) -> Quantized:
        return replace(self, groups=groups.astype(np.int64))


def random_linear(
    in_features: int,
    out_features: int,
    group_size: int,
    *,
    bits: int = 4,
    symmetric: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float16,
) -> Quantized:
    """Codes around their zero points, as of real weights, with some at either end of the range.

    Zero points are at least 1, because 0 is ambiguous in GPTQ v1. Rows are in natural order.
    """
    rng = np.random.default_rng(seed)
    group_size = in_features if group_size == -1 else group_size
    num_groups = -(-in_features // group_size)
    middle = 2 ** (bits - 1)
    zeros = np.full((num_groups, out_features), middle)
    if not symmetric:
        zeros = np.clip(middle + rng.integers(-2, 3, zeros.shape), 1, 2**bits - 1)
    scales = torch.from_numpy(rng.uniform(0.001, 0.1, zeros.shape)) * torch.from_numpy(rng.choice([-1, 1], zeros.shape))
    groups = np.arange(in_features) // group_size
    spread = min(2.0**bits / 5, 10.0)
    codes = np.rint(rng.normal(zeros[groups], spread)).astype(np.int64).clip(0, 2**bits - 1)
    ends = rng.choice(codes.size, 16, replace=False)
    codes.flat[ends[:8]], codes.flat[ends[8:]] = 0, 2**bits - 1
    return Quantized(bits, codes, zeros, scales.to(dtype), groups)


# GPTQ


def gptq_zero_words(zeros: Ints, bits: int, convention: str) -> npt.NDArray[np.int32]:
    """qzeros as the named writer stores them: "v2", "v1" (each field less one), "whole word" (the word less one)."""
    if convention == "v2":
        return pack(zeros, bits)
    if convention == "v1":
        return pack((zeros - 1) % 2**bits, bits)
    ones = sum(1 << place for place in range(0, 32, bits))
    less = (pack(zeros, bits).view(np.uint32).astype(np.int64) - ones) % 2**32
    return less.astype(np.uint32).view(np.int32)


def gptq_tensors(
    name: str, linear: Quantized, convention: str = "v1", *, g_idx: npt.NDArray[Any] | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of module `name`; without `g_idx`, the linear's own groups are written."""
    groups = linear.groups if g_idx is None else g_idx
    return {
        f"{name}.qweight": torch.from_numpy(pack(linear.codes.T, linear.bits).T.copy()),
        f"{name}.qzeros": torch.from_numpy(gptq_zero_words(linear.zeros, linear.bits, convention)),
        f"{name}.scales": linear.scales,
        f"{name}.g_idx": torch.from_numpy(groups.astype(np.int32)),
    }


def gptq_weight(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor, bits: int, convention: str
) -> Floats:
    """float32 [K, N] of tensors whose zero points are stored by "v1" or "v2"."""
    stored = unpack(qzeros.numpy(), bits)
    zeros = stored if convention == "v2" else (stored + 1) % 2**bits
    codes = unpack(qweight.numpy().T, bits).T
    return Quantized(bits, codes, zeros, scales, g_idx.numpy().astype(np.int64)).weight


# AWQ


def awq_tensors(name: str, linear: Quantized) -> dict[str, torch.Tensor]:
    """The tensors of module `name` in AutoAWQ's GEMM layout."""
    return {
        f"{name}.qweight": torch.from_numpy(awq_pack(linear.codes)),
        f"{name}.qzeros": torch.from_numpy(awq_pack(linear.zeros)),
        f"{name}.scales": linear.scales,
    }


def awq_weight(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> Floats:
    """float32 [K, N]."""
    codes = awq_unpack(qweight.numpy())
    groups = np.arange(len(codes)) // (len(codes) // len(scales))
    return Quantized(4, codes, awq_unpack(qzeros.numpy()), scales, groups).weight


# GGUF


def half_split(rows: npt.NDArray[Any], num_heads: int) -> npt.NDArray[Any]:
    """Rows of q or k as llama.cpp stores them (pairs side by side), back in the order of transformers (halves)."""
    half = rows.shape[0] // num_heads // 2
    return np.stack(
        [
            rows[head * 2 * half + 2 * pair + part]
            for head in range(num_heads)
            for part in range(2)
            for pair in range(half)
        ]
    )


# compressed-tensors


def compressed_tensors(
    name: str, linear: Quantized, *, g_idx: npt.NDArray[Any] | None = None, with_zeros: bool = True
) -> dict[str, torch.Tensor]:
    """The tensors of module `name`, format pack-quantized; an order is written only if `g_idx` is given."""
    tensors = {
        f"{name}.weight_packed": torch.from_numpy(pack(linear.codes.T, linear.bits)),
        f"{name}.weight_scale": linear.scales.t().contiguous(),
        f"{name}.weight_shape": torch.tensor([linear.out_features, linear.in_features]),
    }
    if with_zeros:
        # Outputs that do not fill a word are padded.
        padding = -linear.out_features % (32 // linear.bits)
        padded = np.pad(linear.zeros, ((0, 0), (0, padding)))
        tensors[f"{name}.weight_zero_point"] = torch.from_numpy(pack(padded, linear.bits).T.copy())
    if g_idx is not None:
        tensors[f"{name}.weight_g_idx"] = torch.from_numpy(g_idx.astype(np.int32))
    return tensors


def compressed_weight(tensors: dict[str, torch.Tensor], name: str, bits: int) -> Floats:
    """float32 [K, N] of the tensors of module `name`."""
    out_features, in_features = tensors[f"{name}.weight_shape"].tolist()
    codes = unpack(tensors[f"{name}.weight_packed"].numpy(), bits)[:, :in_features].T
    scales = tensors[f"{name}.weight_scale"].t()
    zeros = np.full(scales.shape, 2 ** (bits - 1))
    if f"{name}.weight_zero_point" in tensors:
        zeros = unpack(tensors[f"{name}.weight_zero_point"].numpy().T, bits)[:, :out_features]
    groups = np.arange(in_features) // (in_features // len(scales))
    if f"{name}.weight_g_idx" in tensors:
        groups = tensors[f"{name}.weight_g_idx"].numpy().astype(np.int64)
    return Quantized(bits, codes, zeros, scales, groups).weight
