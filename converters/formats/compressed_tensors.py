"""compressed-tensors, format pack-quantized: the words of GPTQ lying on their side, in the library's own terms.

::

    weight_packed      int32 [out, in * bits / 32]       LSB first along in: the words of PackedWeight, transposed
    weight_scale       float [out, groups]
    weight_zero_point  int32 [out * bits / 32, groups]   LSB first along out; asymmetric weights only
    weight_shape       int [2]                           (out, in), which the model knows already
    weight_g_idx       int32 [in], optional              the group of each input row; -1 where it was never set

Codes and zero points are signed in the library and stored with an offset of half the range, which cancels:
W[k, n] = (Q[k, n] - Z[g, n]) * S[g, n] with what is stored. Invariant: nothing is rounded.
"""

from __future__ import annotations

import torch

from converters.errors import CheckpointError
from converters.formats.base import read_bias, read_scales
from converters.formats.bitfields import unpack_rows
from converters.formats.compressed_tensors_headers import CompressedTensorsHeaders, Layout, Names
from converters.formats.groups import ordered_weight, read_group_of_row
from converters.source import LinearSlot, Weight
from converters.tensors import ReadableCheckpoint


class CompressedTensorsFormat(CompressedTensorsHeaders):
    """Reads the quantized linears of compressed-tensors checkpoints."""

    def read(self, slot: LinearSlot, checkpoint: ReadableCheckpoint) -> Weight:
        """The linear as a record of 4 or 8 bits; dense where groups are irregular."""
        names, layout = Names.of(slot.name), self.layout(slot, checkpoint.tensors)
        self._check_shape(slot, names, checkpoint)
        zeros = self._read_zeros(slot, layout, checkpoint)
        is_constant = zeros is None or bool((zeros == layout.middle).all())
        return ordered_weight(
            slot,
            bits=layout.bits,
            codes=checkpoint.read(names.codes).t().contiguous(),
            scales=read_scales(checkpoint, names.scales).t().contiguous(),
            group_size=layout.group_size,
            zero_const=layout.middle if is_constant else None,
            zeros=None if is_constant else zeros,
            group_of_row=read_group_of_row(
                names.order, slot, layout.num_groups, layout.group_size, checkpoint, self._notices
            ),
            bias=read_bias(slot, checkpoint),
            origin={"format": "compressed-tensors", "bits": str(layout.bits)},
            notices=self._notices,
        )

    def _read_zeros(self, slot: LinearSlot, layout: Layout, checkpoint: ReadableCheckpoint) -> torch.Tensor | None:
        """uint8 [groups, out]. Symmetric models sometimes carry a table of nothing, which does not count."""
        if self._scheme.for_module(slot.name).symmetric:
            return None
        words = checkpoint.read(Names.of(slot.name).zeros)
        return unpack_rows(words, layout.bits)[: slot.out_features].t().contiguous()

    @staticmethod
    def _check_shape(slot: LinearSlot, names: Names, checkpoint: ReadableCheckpoint) -> None:
        if names.shape not in checkpoint.tensors:
            return
        found = checkpoint.read(names.shape).tolist()
        if found != [slot.out_features, slot.in_features]:
            raise CheckpointError(
                f"{checkpoint.path}: {names.shape} holds {found}, expected {[slot.out_features, slot.in_features]}; "
                "the file is damaged"
            )
