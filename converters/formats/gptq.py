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

import torch

from converters.detect import QuantizationScheme
from converters.formats.base import read_bias, read_scales
from converters.formats.bitfields import add_one_to_words, is_constant, unpack_columns, widen_rows
from converters.formats.gptq_headers import GPTQHeaders, Layout
from converters.formats.groups import ordered_weight, read_group_of_row
from converters.report import Notices
from converters.source import LinearSlot, Weight
from converters.tensors import ReadableCheckpoint
from quant_kernels.packed_weight import CODES_PER_WORD
from quant_kernels.packing import unpack_codes

#: Word rows looked at when the zero-point convention is cross-checked.
_SAMPLED_WORDS = 16


class GPTQFormat(GPTQHeaders):
    """Reads the quantized linears of GPTQ checkpoints."""

    def __init__(self, scheme: QuantizationScheme, notices: Notices) -> None:
        super().__init__(scheme, notices)
        self._zero_points = _ZeroPoints(scheme, notices)

    def read(self, slot: LinearSlot, checkpoint: ReadableCheckpoint) -> Weight:
        """The linear as a record of 4 bits (2, 3, 4) or 8; dense where groups are irregular."""
        layout = self.layout(slot, checkpoint.tensors)
        scales = read_scales(checkpoint, f"{slot.name}.scales")
        words = checkpoint.read(f"{slot.name}.qweight")
        codes = words if layout.bits in CODES_PER_WORD else widen_rows(words, layout.bits)
        group_of_row = read_group_of_row(
            f"{slot.name}.g_idx", slot, layout.num_groups, layout.group_size, checkpoint, self._notices
        )
        constant, zeros = self._zero_points.read(slot, layout, checkpoint)
        if zeros is not None:
            self._zero_points.cross_check(slot, layout, codes, zeros, group_of_row)
        return ordered_weight(
            slot,
            bits=layout.stored_bits,
            codes=codes,
            scales=scales,
            group_size=layout.group_size,
            zero_const=constant,
            zeros=zeros,
            group_of_row=group_of_row,
            bias=read_bias(slot, checkpoint),
            origin={
                "format": "gptq",
                "bits": str(layout.bits),
                "checkpoint_format": self._scheme.checkpoint_format,
                "quantizer": self._scheme.quantizer,
            },
            notices=self._notices,
        )


class _ZeroPoints:
    """Decodes qzeros under the convention of the file."""

    def __init__(self, scheme: QuantizationScheme, notices: Notices) -> None:
        self._scheme = scheme
        self._notices = notices
        self._is_v2 = scheme.checkpoint_format == "gptq_v2"

    def read(
        self, slot: LinearSlot, layout: Layout, checkpoint: ReadableCheckpoint
    ) -> tuple[int | None, torch.Tensor | None]:
        """Either the constant zero point or uint8 [groups, out]."""
        name = f"{slot.name}.qzeros"
        middle = layout.middle
        is_symmetric = self._scheme.for_module(slot.name).symmetric
        if name not in checkpoint.tensors:
            return middle, None
        words = checkpoint.read(name)
        if is_symmetric:
            # Files exist that say v1 and store v2: with a constant zero point both mean the same.
            if any(is_constant(words, layout.bits, value) for value in (middle - 1, middle)):
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
        layout: Layout,
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
