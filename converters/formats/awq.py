"""AWQ in the gemm version: 4-bit codes packed along the outputs, in an order made for one kernel's registers.

::

    qweight int32 [in, out / 8], qzeros int32 [groups, out / 8], scales float [groups, out]
    one word    bit 31                                     0
                | n+7 | n+5 | n+3 | n+1 | n+6 | n+4 | n+2 | n |    columns 8c .. 8c+7, n = 8c

W[k, n] = (Q[k, n] - Z[k // group_size, n]) * S[k // group_size, n], zero points stored as they are.
Invariant: codes, zero points and scales arrive unchanged; only their places differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from converters.checkpoint import Checkpoint, TensorInfo
from converters.detect import QuantizationScheme
from converters.formats.base import FLOAT_DTYPES, check_bias, check_tensor, read_bias, read_scales
from converters.formats.bitfields import transpose_nibbles, unpack_columns
from converters.report import Notices, Report, shape_text
from converters.source import LinearSlot
from quant_kernels.packed_weight import PackedWeight

#: The nibble of a word that holds column 8c + j.
_NIBBLE_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)
_BITS = 4
_ZERO_IF_NONE_STORED = 8


@dataclass(frozen=True, slots=True)
class _Names:
    qweight: str
    qzeros: str
    scales: str

    @staticmethod
    def of(module: str) -> _Names:
        return _Names(f"{module}.qweight", f"{module}.qzeros", f"{module}.scales")


class AWQFormat:
    """Reads the quantized linears of AWQ checkpoints."""

    def __init__(self, scheme: QuantizationScheme, notices: Notices) -> None:
        self._scheme = scheme
        self._notices = notices

    def claims(self, name: str, tensors: Mapping[str, TensorInfo]) -> bool:
        """Whether the module has packed codes."""
        return f"{name}.qweight" in tensors

    def check(self, slot: LinearSlot, tensors: Mapping[str, TensorInfo], report: Report) -> Sequence[str]:
        """Shapes must be those of the gemm version, with whole groups of any size."""
        names = _Names.of(slot.name)
        rows, columns = slot.in_features, slot.out_features
        if rows % 8 or columns % 8:
            report.wrong(names.qweight, f"a layer of {rows} inputs, {columns} outputs", "multiples of 8")
        else:
            check_tensor(report, tensors[names.qweight], (rows, columns // 8), ["I32"])
        used = [names.qweight, *check_bias(slot, tensors, report)]
        scales = tensors.get(names.scales)
        if scales is None:
            report.missing(names.scales, shape_text("F16", (self._declared_groups(slot) or 1, columns)))
            return [*used, *([names.qzeros] if names.qzeros in tensors else [])]
        used.append(names.scales)
        groups = self._check_scales(slot, scales, report)
        zeros = tensors.get(names.qzeros)
        if zeros is not None:
            used.append(names.qzeros)
            check_tensor(report, zeros, (groups, columns // 8), ["I32"])
        elif self._scheme.zero_point:
            report.missing(names.qzeros, shape_text("I32", (groups, columns // 8)))
        return used

    def read(self, slot: LinearSlot, checkpoint: Checkpoint) -> PackedWeight:
        """The linear as a 4-bit record."""
        names = _Names.of(slot.name)
        scales = read_scales(checkpoint, names.scales)
        zeros = self._read_zeros(checkpoint, names.qzeros)
        constant = _ZERO_IF_NONE_STORED if zeros is None or bool((zeros == _ZERO_IF_NONE_STORED).all()) else None
        return PackedWeight(
            bits=_BITS,
            codes=_codes(checkpoint.read(names.qweight)),
            scales=scales,
            group_size=slot.in_features // scales.shape[0],
            in_features=slot.in_features,
            out_features=slot.out_features,
            zero_const=constant,
            zeros=zeros if constant is None else None,
            bias=read_bias(slot, checkpoint),
            origin={"format": "awq", "version": "gemm"},
        )

    def _declared_groups(self, slot: LinearSlot) -> int | None:
        size = self._scheme.for_module(slot.name).group_size
        if size is None:
            return None
        return 1 if size == -1 else max(1, slot.in_features // size)

    def _check_scales(self, slot: LinearSlot, scales: TensorInfo, report: Report) -> int:
        """The number of groups, which the shapes decide; a config that differs is worth a warning."""
        declared = self._declared_groups(slot)
        groups = scales.shape[0] if len(scales.shape) == 2 else 0
        if groups < 1 or slot.in_features % groups:
            check_tensor(report, scales, (declared or 1, slot.out_features), FLOAT_DTYPES)
            return declared or 1
        is_right = check_tensor(report, scales, (groups, slot.out_features), FLOAT_DTYPES)
        if is_right and declared not in (None, groups):
            self._notices.warn(
                "group_size",
                f"config says group_size {self._scheme.group_size}, but {slot.name} has {groups} groups over "
                f"{slot.in_features} inputs; following the tensors",
            )
        return groups

    @staticmethod
    def _read_zeros(checkpoint: Checkpoint, name: str) -> torch.Tensor | None:
        if name not in checkpoint.tensors:
            return None
        fields = unpack_columns(checkpoint.read(name), _BITS)
        groups = fields.shape[0]
        return fields.view(groups, -1, 8)[:, :, _NIBBLE_OF_COLUMN].reshape(groups, -1)


def _codes(qweight: torch.Tensor) -> torch.Tensor:
    """int32 [K, N / 8], packed along N, to int32 [K / 8, N], packed along K."""
    nibbles = transpose_nibbles(qweight)[:, _NIBBLE_OF_COLUMN]
    return nibbles.transpose(1, 2).reshape(nibbles.shape[0], -1)
