"""GPTQ: codes packed along the inputs, zero points along the outputs, perhaps in activation order.

::

    qweight int32 [in * bits / 32, out]        LSB first along in: the words of PackedWeight already, if bits is 4 or 8
    qzeros  int32 [groups, out * bits / 32]    LSB first along out
    scales  float [groups, out]
    g_idx   int32 [in], optional               the group of each input row

W[k, n] = (Q[k, n] - Z[g_idx[k], n]) * S[g_idx[k], n]. Version 1 stores Z - 1, version 2 stores Z; how each is decoded
is `_ZeroPoints`' matter. Bits and group size follow the shapes, and whether there is an activation order follows g_idx,
whatever the config says. Invariant: nothing is rounded; what a PackedWeight cannot express becomes dense, exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from converters.checkpoint import Checkpoint, TensorInfo
from converters.detect import GPTQ_BITS, ModuleScheme, QuantizationScheme
from converters.errors import CheckpointError
from converters.files import shown
from converters.formats.base import FLOAT_DTYPES, check_bias, check_tensor, read_bias, read_scales
from converters.formats.bitfields import add_one_to_words, unpack_columns, widen_rows
from converters.report import Notices, Report, shape_text
from converters.source import LinearSlot
from quant_kernels.packed_weight import CODES_PER_WORD, DenseWeight, PackedWeight
from quant_kernels.packing import gather_rows, unpack_codes

_USUAL_GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)
#: Word rows looked at when the zero-point convention is cross-checked.
_SAMPLED_WORDS = 16
_PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True, slots=True)
class _Layout:
    """What the shapes of one linear say."""

    bits: int
    group_size: int
    num_groups: int

    @property
    def stored_bits(self) -> int:
        """Bits of the PackedWeight: 2 and 3 widen to 4, which changes no value."""
        return max(4, self.bits)


class GPTQFormat:
    """Reads the quantized linears of GPTQ checkpoints."""

    def __init__(self, scheme: QuantizationScheme, notices: Notices) -> None:
        self._scheme = scheme
        self._notices = notices
        self._zero_points = _ZeroPoints(scheme, notices)

    def claims(self, name: str, tensors: Mapping[str, TensorInfo]) -> bool:
        """Whether the module has packed codes."""
        return f"{name}.qweight" in tensors

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

    def read(self, slot: LinearSlot, checkpoint: Checkpoint) -> PackedWeight | DenseWeight:
        """The linear as a record of 4 bits (2, 3, 4) or 8; dense where groups are irregular."""
        layout = self._layout(slot, checkpoint.tensors)
        scales = read_scales(checkpoint, f"{slot.name}.scales")
        words = checkpoint.read(f"{slot.name}.qweight")
        codes = words if layout.bits in CODES_PER_WORD else widen_rows(words, layout.bits)
        group_of_row = self._read_group_of_row(slot, layout, checkpoint)
        constant, zeros = self._zero_points.read(slot, layout, checkpoint)
        if zeros is not None:
            self._zero_points.cross_check(slot, layout, codes, zeros, group_of_row)
        order = None if group_of_row is None else torch.argsort(group_of_row, stable=True)
        if group_of_row is not None and order is not None and not _is_regular(group_of_row[order], layout.group_size):
            self._notices.warn(
                "irregular groups", f"{slot.name} has groups of unequal sizes; such layers run unquantized, exactly"
            )
            zeros = torch.full(scales.shape, constant or 0, dtype=torch.uint8) if zeros is None else zeros
            weight = _expand(codes, layout.stored_bits, scales, zeros, group_of_row)
            return DenseWeight(weight, read_bias(slot, checkpoint))
        return PackedWeight(
            bits=layout.stored_bits,
            codes=codes if order is None else gather_rows(codes, layout.stored_bits, order),
            scales=scales,
            group_size=layout.group_size,
            in_features=slot.in_features,
            out_features=slot.out_features,
            zero_const=constant,
            zeros=zeros,
            perm=None if order is None else order.to(torch.int32),
            bias=read_bias(slot, checkpoint),
            origin={
                "format": "gptq",
                "bits": str(layout.bits),
                "checkpoint_format": self._scheme.checkpoint_format,
                "quantizer": self._scheme.quantizer,
            },
        )

    # Headers

    def _check_words(self, slot: LinearSlot, words: TensorInfo, module: ModuleScheme, report: Report) -> int | None:
        """Bits by the shape of qweight, or None with the problem reported."""
        bits = _bits_by_shape(slot, words)
        wanted = bits or module.bits or 4
        right = check_tensor(report, words, (slot.in_features * wanted // 32, slot.out_features), ["I32"])
        if right and bits is None:
            report.wrong(words.name, f"of {slot.in_features} inputs", "whole words of 2, 3, 4 or 8 bits")
        if not right or bits is None:
            return None
        if slot.in_features % CODES_PER_WORD[max(4, bits)]:
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

    def _layout(self, slot: LinearSlot, tensors: Mapping[str, TensorInfo]) -> _Layout:
        bits = _bits_by_shape(slot, tensors[f"{slot.name}.qweight"])
        num_groups = tensors[f"{slot.name}.scales"].shape[0]
        declared = self._scheme.for_module(slot.name).group_size
        group_size = _group_size_by_shape(slot.in_features, num_groups, declared)
        assert bits is not None, "the source checks a slot before it reads it"
        assert group_size is not None, "the source checks a slot before it reads it"
        return _Layout(bits, group_size, num_groups)

    # Activation order

    def _read_group_of_row(self, slot: LinearSlot, layout: _Layout, checkpoint: Checkpoint) -> torch.Tensor | None:
        """g_idx as int64 [in], or None where row k simply uses group k // group_size."""
        name = f"{slot.name}.g_idx"
        if layout.num_groups == 1 or name not in checkpoint.tensors:
            return None
        group_of_row = checkpoint.read(name).to(torch.int64)
        low, high = int(group_of_row.min()), int(group_of_row.max())
        if low < 0 or high >= layout.num_groups:
            raise CheckpointError(
                f"{checkpoint.path}: {shown(name)} holds groups from {low} to {high}, expected 0 to "
                f"{layout.num_groups - 1}; the file is damaged"
            )
        if high == 0:
            self._notices.warn("empty g_idx", f"{name} is all zero although there are several groups; ignoring it")
            return None
        natural = torch.arange(slot.in_features) // layout.group_size
        return None if torch.equal(group_of_row, natural) else group_of_row


class _ZeroPoints:
    """Decodes qzeros under the convention of the file."""

    def __init__(self, scheme: QuantizationScheme, notices: Notices) -> None:
        self._scheme = scheme
        self._notices = notices
        self._is_v2 = scheme.checkpoint_format == "gptq_v2"

    def read(self, slot: LinearSlot, layout: _Layout, checkpoint: Checkpoint) -> tuple[int | None, torch.Tensor | None]:
        """Either the constant zero point or uint8 [groups, out]."""
        name = f"{slot.name}.qzeros"
        middle = 2 ** (layout.bits - 1)
        is_symmetric = self._scheme.for_module(slot.name).symmetric
        if name not in checkpoint.tensors:
            return middle, None
        words = checkpoint.read(name)
        if is_symmetric:
            # Files exist that say v1 and store v2: with a constant zero point both mean the same.
            stored = unpack_columns(words, layout.bits)
            if bool((stored == middle - 1).all()) or bool((stored == middle).all()):
                return middle, None
            self._notices.warn(
                "symmetric", f"config says symmetric, but the zero points of {slot.name} vary; reading them as they are"
            )
        return None, self._decode(words, layout.bits)

    def _decode(self, words: torch.Tensor, bits: int) -> torch.Tensor:
        if self._is_v2:
            return unpack_columns(words, bits)
        if self._scheme.quantizer.lower().startswith("gptqmodel") and bits != 3:
            # It subtracts one from whole words, so that a zero point of 0 borrows from its neighbour.
            return unpack_columns(add_one_to_words(words, bits), bits)
        zeros: torch.Tensor = (unpack_columns(words, bits) + 1) & (2**bits - 1)
        return zeros

    def cross_check(
        self,
        slot: LinearSlot,
        layout: _Layout,
        codes: torch.Tensor,
        zeros: torch.Tensor,
        group_of_row: torch.Tensor | None,
    ) -> None:
        """Weights are zero on average; a mean of one step off speaks for the other convention. Only a warning."""
        if layout.bits > 4:
            return
        per_word = CODES_PER_WORD[layout.stored_bits]
        picked = torch.linspace(0, codes.shape[0] - 1, min(_SAMPLED_WORDS, codes.shape[0])).to(torch.int64)
        rows = (picked.unsqueeze(1) * per_word + torch.arange(per_word)).flatten()
        groups = rows // layout.group_size if group_of_row is None else group_of_row[rows]
        mean = float((unpack_codes(codes[picked], layout.stored_bits).float() - zeros[groups].float()).mean())
        under_other = mean - 1 if self._is_v2 else mean + 1
        if abs(mean) > 0.5 and abs(under_other) < abs(mean):
            said, other = ("gptq_v2", "gptq") if self._is_v2 else ("gptq", "gptq_v2")
            self._notices.warn(
                "convention",
                f"the weights of {slot.name} are {mean:+.2f} steps off zero on average under checkpoint_format {said}, "
                f"which the config says; if the output is noise, try {other} in the config",
            )


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


def _is_regular(sorted_groups: torch.Tensor, group_size: int) -> bool:
    """Whether the sorted rows fill one group after the other, the last one being perhaps short."""
    return torch.equal(sorted_groups, torch.arange(len(sorted_groups)) // group_size)


def _expand(
    codes: torch.Tensor, bits: int, scales: torch.Tensor, zeros: torch.Tensor, group_of_row: torch.Tensor
) -> torch.Tensor:
    """float32 [out, in], exact: a small integer times a scale of 11 significant bits."""
    steps = unpack_codes(codes, bits).float() - zeros.float()[group_of_row]
    return (steps * scales.float()[group_of_row]).t().contiguous()
