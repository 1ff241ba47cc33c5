"""GPTQ linears as their headers describe them: sizes, bits and groups, without their data and without torch.

See `gptq` for the layout. Bits and group size follow the shapes, whatever the config says. Invariant: a linear that
passes `check` has the `layout` that its reader follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from converters.checkpoint import TensorInfo
from converters.detect import GPTQ_BITS, ModuleScheme
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

_USUAL_GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)
#: Codes in an int32 word of a record.
_CODES_PER_WORD = {4: 8, 8: 4}
_PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True, slots=True)
class Layout:
    """What the shapes of one linear say."""

    bits: int
    group_size: int
    num_groups: int

    @property
    def stored_bits(self) -> int:
        """Bits of the PackedWeight: 2 and 3 widen to 4, which changes no value."""
        return max(4, self.bits)

    @property
    def middle(self) -> int:
        """The zero point of symmetric weights."""
        return int(2 ** (self.bits - 1))


class GPTQHeaders(QuantizedHeaders):
    """Knows the quantized linears of GPTQ checkpoints."""

    def check(self, slot: LinearSlot, tensors: Mapping[str, TensorInfo], report: Report) -> Sequence[str]:
        """Shapes must agree with the slot for some bits and group size."""
        used = [f"{slot.name}.{part}" for part in _PARTS if f"{slot.name}.{part}" in tensors]
        used += check_bias(slot, tensors, report)
        module = self._scheme.for_module(slot.name)
        bits = self._check_words(slot, tensors[f"{slot.name}.qweight"], module, report)
        num_groups = self._check_scales(slot, tensors, module, report)
        if bits is None or num_groups is None:
            return used
        zeros = tensors.get(f"{slot.name}.qzeros")
        shape = (num_groups, slot.out_features * bits // 32)
        if slot.out_features * bits % 32:
            report.wrong(f"{slot.name}.qzeros", f"of {slot.out_features} outputs", "a multiple of 32 / bits")
        elif zeros is not None:
            check_tensor(report, zeros, shape, ["I32"])
        elif not module.symmetric:
            report.missing(f"{slot.name}.qzeros", shape_text("I32", shape))
        group_of_row = tensors.get(f"{slot.name}.g_idx")
        if group_of_row is not None:
            check_tensor(report, group_of_row, (slot.in_features,), ["I32", "I64"])
        return used

    def layout(self, slot: LinearSlot, tensors: Mapping[str, TensorInfo]) -> Layout:
        """Of a checked slot."""
        bits = _bits_by_shape(slot, tensors[f"{slot.name}.qweight"])
        num_groups = tensors[f"{slot.name}.scales"].shape[0]
        declared = self._scheme.for_module(slot.name).group_size
        group_size = _group_size_by_shape(slot.in_features, num_groups, declared)
        assert bits is not None, "the source checks a slot before it reads it"
        assert group_size is not None, "the source checks a slot before it reads it"
        return Layout(bits, group_size, num_groups)

    def facts(self, slot: LinearSlot, tensors: Mapping[str, TensorInfo]) -> WeightFacts:
        """Believes the config where only the data would tell: symmetric zero points, and whether there is an order."""
        layout = self.layout(slot, tensors)
        has_table = f"{slot.name}.qzeros" in tensors and not self._scheme.for_module(slot.name).symmetric
        return WeightFacts(
            slot.in_features,
            slot.out_features,
            bits=layout.stored_bits,
            group_size=layout.group_size,
            zero_const=None if has_table else layout.middle,
            scale_dtype=DTYPE_NAMES[tensors[f"{slot.name}.scales"].dtype],
            has_order=self._scheme.desc_act and layout.num_groups > 1 and f"{slot.name}.g_idx" in tensors,
            bias_dtype=bias_dtype(slot, tensors),
        )

    def _check_words(self, slot: LinearSlot, words: TensorInfo, module: ModuleScheme, report: Report) -> int | None:
        """Bits by the shape of qweight, or None with the problem reported."""
        bits = _bits_by_shape(slot, words)
        wanted = bits or module.bits or 4
        right = check_tensor(report, words, (slot.in_features * wanted // 32, slot.out_features), ["I32"])
        if right and bits is None:
            report.wrong(words.name, f"of {slot.in_features} inputs", "whole words of 2, 3, 4 or 8 bits")
        if not right or bits is None:
            return None
        if slot.in_features % _CODES_PER_WORD[max(4, bits)]:
            report.wrong(words.name, f"of {slot.in_features} inputs", "a multiple of 8")
            return None
        if module.bits not in (None, bits):
            self._notices.warn(
                "bits", f"config says {module.bits} bits, but {slot.name} has {bits}; following the tensors"
            )
        if module.skipped:
            self._notices.warn(
                "skipped", f"config says that {slot.name} is not quantized, but it is; following the tensors"
            )
        return bits

    def _check_scales(
        self, slot: LinearSlot, tensors: Mapping[str, TensorInfo], module: ModuleScheme, report: Report
    ) -> int | None:
        """The number of groups by the shape of scales, or None with the problem reported."""
        name = f"{slot.name}.scales"
        declared = _num_groups(slot.in_features, module.group_size or -1)
        scales = tensors.get(name)
        if scales is None:
            report.missing(name, shape_text("F16", (declared, slot.out_features)))
            return None
        num_groups = scales.shape[0] if len(scales.shape) == 2 else 0
        group_size = _group_size_by_shape(slot.in_features, num_groups, module.group_size)
        if group_size is None:
            report.wrong(name, str(scales), shape_text("F16", (declared, slot.out_features)))
            return None
        if not check_tensor(report, scales, (num_groups, slot.out_features), FLOAT_DTYPES):
            return None
        if module.group_size is not None and num_groups != declared:
            self._notices.warn(
                "group_size",
                f"config says group_size {module.group_size}, but {slot.name} has {num_groups} groups over "
                f"{slot.in_features} inputs; taking groups of {group_size}",
            )
        return num_groups


def _bits_by_shape(slot: LinearSlot, words: TensorInfo) -> int | None:
    if len(words.shape) != 2:
        return None
    bits, rest = divmod(words.shape[0] * 32, slot.in_features)
    return bits if bits in GPTQ_BITS and rest == 0 else None


def _num_groups(in_features: int, group_size: int) -> int:
    return 1 if group_size == -1 else -(-in_features // group_size)


def _group_size_by_shape(in_features: int, num_groups: int, declared: int | None) -> int | None:
    """The declared group size if it gives this many groups, else the smallest usual one that does; None if none."""
    if num_groups == 1:
        return in_features
    sizes = _USUAL_GROUP_SIZES if declared is None else (declared, *_USUAL_GROUP_SIZES)
    return next((size for size in sizes if _num_groups(in_features, size) == num_groups), None)
