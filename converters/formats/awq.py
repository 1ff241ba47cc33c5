"""AWQ in the gemm version: 4-bit codes packed along the outputs, in an order made for one kernel's registers.

::

    qweight int32 [in, out / 8], qzeros int32 [groups, out / 8], scales float [groups, out]
    one word    bit 31                                     0
                | n+7 | n+5 | n+3 | n+1 | n+6 | n+4 | n+2 | n |    columns 8c .. 8c+7, n = 8c

W[k, n] = (Q[k, n] - Z[k // group_size, n]) * S[k // group_size, n], zero points stored as they are.
Invariant: codes, zero points and scales arrive unchanged; only their places differ.
"""

from __future__ import annotations

import torch

from converters.formats.awq_headers import BITS, ZERO_IF_NONE_STORED, AWQHeaders, Names
from converters.formats.base import read_bias, read_scales
from converters.formats.bitfields import pack_columns, transpose_nibbles, unpack_columns
from converters.source import LinearSlot
from converters.tensors import ReadableCheckpoint
from quant_kernels.packed_weight import PackedWeight

#: The nibble of a word that holds column 8c + j.
_NIBBLE_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)
#: The column that lies in each nibble.
_COLUMN_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)
#: Words that are rearranged at a time: what a core's cache holds.
_WORDS_AT_ONCE = 2**17


class AWQFormat(AWQHeaders):
    """Reads the quantized linears of AWQ checkpoints."""

    def read(self, slot: LinearSlot, checkpoint: ReadableCheckpoint) -> PackedWeight:
        """The linear as a 4-bit record."""
        names = Names.of(slot.name)
        scales = read_scales(checkpoint, names.scales)
        zeros = self._read_zeros(checkpoint, names.qzeros)
        constant = ZERO_IF_NONE_STORED if zeros is None or bool((zeros == ZERO_IF_NONE_STORED).all()) else None
        return PackedWeight(
            bits=BITS,
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

    @staticmethod
    def _read_zeros(checkpoint: ReadableCheckpoint, name: str) -> torch.Tensor | None:
        if name not in checkpoint.tensors:
            return None
        fields = unpack_columns(checkpoint.read(name), BITS)
        groups = fields.shape[0]
        return fields.view(groups, -1, 8)[:, :, _NIBBLE_OF_COLUMN].reshape(groups, -1)


def _codes(qweight: torch.Tensor) -> torch.Tensor:
    """int32 [K, N / 8], packed along N, to int32 [K / 8, N], packed along K."""
    rows, columns = qweight.shape
    codes = torch.empty(rows // 8, columns * 8, dtype=torch.int32)
    step = max(1, _WORDS_AT_ONCE // (columns * 8))
    for first in range(0, rows // 8, step):
        nibbles = transpose_nibbles(qweight[first * 8 : (first + step) * 8])[:, _NIBBLE_OF_COLUMN]
        codes[first : first + step] = nibbles.transpose(1, 2).reshape(len(nibbles), -1)
    return codes


def pack_awq_codes(codes: torch.Tensor) -> torch.Tensor:
    """int32 [K / 8, N], packed along K as in a record, to AWQ's int32 [K, N / 8], packed along N."""
    blocks, columns = codes.shape
    words = torch.empty(blocks * 8, columns // 8, dtype=torch.int32)
    step = max(1, _WORDS_AT_ONCE // columns)
    for first in range(0, blocks, step):
        part = codes[first : first + step]
        nibbles = part.view(len(part), -1, 8).transpose(1, 2)[:, _COLUMN_OF_NIBBLE]
        rows = transpose_nibbles(nibbles.reshape(len(part) * 8, -1))
        words[first * 8 : (first + len(part)) * 8] = rows.reshape(len(part) * 8, -1)
    return words


def pack_awq_columns(fields: torch.Tensor) -> torch.Tensor:
    """uint8 [G, N] to AWQ's int32 [G, N / 8]."""
    groups = len(fields)
    return pack_columns(fields.view(groups, -1, 8)[:, :, _COLUMN_OF_NIBBLE].reshape(groups, -1), BITS)
