"""AWQ linears as their headers describe them, without their data and without torch. See `awq` for the layout.

Invariant: a linear that passes `check` has the sizes that its reader expects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from converters.checkpoint import TensorInfo
from converters.formats.base import (
    DTYPE_NAMES,
    FLOAT_DTYPES,
    QuantizedHeaders,
    bias_dtype,
    check_bias,
    check_tensor,
)
from converters.report import Report, shape_text
from converters.source import LinearSlot
from quant_kernels.footprint import WeightFacts

BITS = 4
ZERO_IF_NONE_STORED = 8


@dataclass(frozen=True, slots=True)
class Names:
    """A module's tensors."""

    qweight: str
    qzeros: str
    scales: str

    @staticmethod
    def of(module: str) -> Names:
        """Of a module by its name."""
        return Names(f"{module}.qweight", f"{module}.qzeros", f"{module}.scales")


class AWQHeaders(QuantizedHeaders):
    """Knows the quantized linears of AWQ checkpoints."""

    def check(self, slot: LinearSlot, tensors: Mapping[str, TensorInfo], report: Report) -> Sequence[str]:
        """Shapes must be those of the gemm version, with whole groups of any size."""
        names = Names.of(slot.name)
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

    def facts(self, slot: LinearSlot, tensors: Mapping[str, TensorInfo]) -> WeightFacts:
        """Zero points that are stored are taken to differ; the reader drops a table of nothing but eights."""
        names = Names.of(slot.name)
        scales = tensors[names.scales]
        return WeightFacts(
            slot.in_features,
            slot.out_features,
            bits=BITS,
            group_size=slot.in_features // scales.shape[0],
            zero_const=None if names.qzeros in tensors else ZERO_IF_NONE_STORED,
            scale_dtype=DTYPE_NAMES[scales.dtype],
            bias_dtype=bias_dtype(slot, tensors),
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
