"""compressed-tensors linears as their headers describe them, without their data and without torch.

See `compressed_tensors` for the layout. Bits and group size follow the shapes, whatever the config says. Invariant: a
linear that passes `check` has the `layout` that its reader follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from converters.checkpoint import TensorInfo
from converters.detect import COMPRESSED_BITS
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

_WHOLE_NUMBERS = ("I32", "I64")


@dataclass(frozen=True, slots=True)
class Names:
    """A module's tensors."""

    codes: str
    scales: str
    zeros: str
    shape: str
    order: str

    @staticmethod
    def of(module: str) -> Names:
        """Of a module by its name."""
        parts = ("packed", "scale", "zero_point", "shape", "g_idx")
        return Names(*(f"{module}.weight_{part}" for part in parts))


@dataclass(frozen=True, slots=True)
class Layout:
    """What the shapes of one linear say."""

    bits: int
    group_size: int
    num_groups: int

    @property
    def middle(self) -> int:
        """The zero point of symmetric weights."""
        return int(2 ** (self.bits - 1))


class CompressedTensorsHeaders(QuantizedHeaders):
    """Knows the quantized linears of compressed-tensors checkpoints, format pack-quantized."""

    codes = "weight_packed"

    def check(self, slot: LinearSlot, tensors: Mapping[str, TensorInfo], report: Report) -> Sequence[str]:
        """Shapes must agree with the slot for 4 or 8 bits and some number of whole groups."""
        names = Names.of(slot.name)
        all_names = (names.codes, names.scales, names.zeros, names.shape, names.order)
        used = [*(name for name in all_names if name in tensors), *check_bias(slot, tensors, report)]
        bits = self._check_codes(slot, tensors[names.codes], report)
        num_groups = self._check_scales(slot, tensors.get(names.scales), report)
        if names.shape in tensors:
            check_tensor(report, tensors[names.shape], (2,), _WHOLE_NUMBERS)
        if names.order in tensors:
            check_tensor(report, tensors[names.order], (slot.in_features,), _WHOLE_NUMBERS)
        if bits is None or num_groups is None or self._scheme.for_module(slot.name).symmetric:
            return used
        shape = (-(-slot.out_features * bits // 32), num_groups)
        if names.zeros not in tensors:
            report.missing(names.zeros, shape_text("I32", shape))
        else:
            check_tensor(report, tensors[names.zeros], shape, ["I32"])
        return used

    def layout(self, slot: LinearSlot, tensors: Mapping[str, TensorInfo]) -> Layout:
        """Of a checked slot."""
        names = Names.of(slot.name)
        bits = _bits_by_shape(slot, tensors[names.codes])
        num_groups = tensors[names.scales].shape[1]
        assert bits is not None, "the source checks a slot before it reads it"
        return Layout(bits, slot.in_features // num_groups, num_groups)

    def facts(self, slot: LinearSlot, tensors: Mapping[str, TensorInfo]) -> WeightFacts:
        """Believes the config about symmetry; only the data tell whether an activation order is one."""
        layout = self.layout(slot, tensors)
        names = Names.of(slot.name)
        is_symmetric = self._scheme.for_module(slot.name).symmetric
        return WeightFacts(
            slot.in_features,
            slot.out_features,
            bits=layout.bits,
            group_size=layout.group_size,
            zero_const=layout.middle if is_symmetric else None,
            scale_dtype=DTYPE_NAMES[tensors[names.scales].dtype],
            has_order=self._scheme.desc_act and layout.num_groups > 1 and names.order in tensors,
            bias_dtype=bias_dtype(slot, tensors),
        )

    def _check_codes(self, slot: LinearSlot, words: TensorInfo, report: Report) -> int | None:
        """Bits by the shape of the codes, or None with the problem reported."""
        bits = _bits_by_shape(slot, words)
        module = self._scheme.for_module(slot.name)
        wanted = bits or module.bits or 4
        right = check_tensor(report, words, (slot.out_features, -(-slot.in_features * wanted // 32)), ["I32"])
        if not right or bits is None:
            if right:
                report.wrong(words.name, f"of {slot.in_features} inputs", "whole words of 4 or 8 bits")
            return None
        if module.bits not in (None, bits):
            self._notices.warn(
                "bits", f"config says {module.bits} bits, but {slot.name} has {bits}; following the tensors"
            )
        if module.skipped:
            self._notices.warn("skipped", f"config ignores {slot.name}, but it is quantized; following the tensors")
        return bits

    def _check_scales(self, slot: LinearSlot, scales: TensorInfo | None, report: Report) -> int | None:
        """The number of groups by the shape of the scales, or None with the problem reported."""
        names, size = Names.of(slot.name), self._scheme.for_module(slot.name).group_size
        declared = 1 if size in (None, -1) else max(1, slot.in_features // size)
        if scales is None:
            report.missing(names.scales, shape_text("F16", (slot.out_features, declared)))
            return None
        num_groups = scales.shape[1] if len(scales.shape) == 2 else 0
        if num_groups < 1 or slot.in_features % num_groups:
            report.wrong(names.scales, str(scales), shape_text("F16", (slot.out_features, declared)))
            return None
        if not check_tensor(report, scales, (slot.out_features, num_groups), FLOAT_DTYPES):
            return None
        if num_groups != declared:
            self._notices.warn(
                "group_size",
                f"config says group_size {size}, but {slot.name} has {num_groups} groups over {slot.in_features} "
                "inputs; following the tensors",
            )
        return num_groups


def _bits_by_shape(slot: LinearSlot, words: TensorInfo) -> int | None:
    if len(words.shape) != 2:
        return None
    bits, rest = divmod(words.shape[1] * 32, slot.in_features)
    return bits if bits in COMPRESSED_BITS and rest == 0 else None
