"""AWQ GEMM tensors to PackedWeight, without rounding.

    qweight int32 [K, N / 8]   packed along N in the order 0, 2, 4, 6, 1, 3, 5, 7: bits 4i.. hold column 8c + order[i]
    qzeros  int32 [G, N / 8]   the same; zero points as they are
    scales  float [G, N]       rows in natural order

W[k, n] = (Q[k, n] - Z[k // group, n]) * scales[k // group, n]. Invariant: codes keep their values, only their place in
the words changes. Source: AutoAWQ's GEMM packer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from converters.errors import CheckpointError
from quant_kernels.packed_weight import PackedWeight
from quant_kernels.packing import pack_codes

#: Column j of eight sits in this slot of the word.
_SLOT_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True, slots=True)
class AWQTensors:
    """The tensors of one linear, as read."""

    qweight: torch.Tensor
    scales: torch.Tensor
    qzeros: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def unpack(words: torch.Tensor) -> torch.Tensor:
    """int32 [R, N / 8] to uint8 codes [R, N]."""
    shifts = torch.tensor(_SLOT_OF_COLUMN, dtype=torch.int32) * 4
    return ((words.unsqueeze(-1) >> shifts) & 15).to(torch.uint8).reshape(words.shape[0], -1)


def convert(name: str, tensors: AWQTensors, in_features: int) -> PackedWeight:
    """One linear.

    Raises:
        CheckpointError: for scales that are not finite.
    """
    if not bool(tensors.scales.isfinite().all()):
        raise CheckpointError(f"{name}.scales holds NaN or infinity; the file is damaged, download it again")
    num_groups, out_features = tensors.scales.shape
    return PackedWeight(
        bits=4,
        codes=pack_codes(unpack(tensors.qweight), 4),
        scales=tensors.scales,
        group_size=in_features // num_groups,
        in_features=in_features,
        out_features=out_features,
        zero_const=8 if tensors.qzeros is None else None,
        zeros=None if tensors.qzeros is None else unpack(tensors.qzeros),
        bias=tensors.bias,
        origin={"format": "awq"},
    )
