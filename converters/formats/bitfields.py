"""Moving bit fields between the words of checkpoint files and those of PackedWeight.

All words are int32 used as bit containers. Invariant: every function moves fields and changes none; intermediate
tensors stay within a small multiple of the input, however large the layer is.
"""

from __future__ import annotations

import torch

from quant_kernels.packed_weight import CODES_PER_WORD
from quant_kernels.packing import pack_codes

#: Columns that are widened at a time, so that the unpacked codes of a large layer never exist all at once.
_COLUMNS_AT_ONCE = 1024


def unpack_rows(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [R, N], packed along rows, LSB first, to uint8 [R * 32 / bits, N].

    2, 4 and 8 bits fill whole words. Three bits are one stream of 96 bits over three rows, in which a field may
    straddle two words::

        word 0: v0 .. v9, low 2 of v10 | word 1: high 1 of v10, v11 .. v20, low 1 of v21 | word 2: high 2 of v21, ..
    """
    words_per_block, per_block = (3, 32) if bits == 3 else (1, 32 // bits)
    rows, columns = words.shape
    blocks = words.reshape(rows // words_per_block, words_per_block, columns)
    fields = torch.empty(blocks.shape[0], per_block, columns, dtype=torch.uint8)
    for item in range(per_block):
        word, shift = divmod(item * bits, 32)
        value = blocks[:, word] >> shift
        if shift + bits > 32:
            # The arithmetic shift above filled the high bits with the sign: clear them before adding the next word's.
            value = (value & (2 ** (32 - shift) - 1)) | (blocks[:, word + 1] << (32 - shift))
        fields[:, item] = (value & (2**bits - 1)).to(torch.uint8)
    return fields.reshape(-1, columns)


def unpack_columns(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [G, C], packed along columns, LSB first, to uint8 [G, C * 32 / bits]."""
    return unpack_rows(words.t().contiguous(), bits).t().contiguous()


def is_constant(words: torch.Tensor, bits: int, value: int) -> bool:
    """Whether every field of int32 [G, C], packed along columns, is `value`."""
    if 32 % bits:
        return bool((unpack_columns(words, bits) == value).all())
    word = sum(value << shift for shift in range(0, 32, bits))
    return bool((words == (word - 2**32 if word >= 2**31 else word)).all())


def pack_columns(fields: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [G, N] of 4 or 8 bits to int32 [G, N * bits / 32], LSB first along columns."""
    return pack_codes(fields.t().contiguous(), bits).t().contiguous()


def add_one_to_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Add one to every field by one addition per word, carries running into the next field, modulo 2**32."""
    ones = sum(1 << shift for shift in range(0, 32, bits))
    total = (words.to(torch.int64) + ones) & 0xFFFFFFFF
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)


def widen_rows(words: torch.Tensor, bits: int) -> torch.Tensor:
    """2- or 3-bit codes [R, N] as 4-bit codes int32 [K / 8, N]; the values stay what they are."""
    num_rows = words.shape[0] * 32 // bits
    codes = torch.empty(num_rows // CODES_PER_WORD[4], words.shape[1], dtype=torch.int32)
    for start in range(0, words.shape[1], _COLUMNS_AT_ONCE):
        columns = slice(start, start + _COLUMNS_AT_ONCE)
        codes[:, columns] = pack_codes(unpack_rows(words[:, columns], bits), 4)
    return codes


def transpose_nibbles(words: torch.Tensor) -> torch.Tensor:
    """int32 [K, C] to int32 [K / 8, 8, C]: word [r, s, c] holds nibble s of rows 8r .. 8r+7 of column c, LSB first.

    Each 8 x 8 block of nibbles is transposed in three steps that swap ever smaller quarters between two words::

        a  | a1 a0 |        a  | b0 a0 |
        b  | b1 b0 |   ->   b  | b1 a1 |     16, then 8, then 4 bits wide
    """
    blocks = words.reshape(-1, 8, words.shape[1]).clone()
    for distance, mask in ((4, 0x0000FFFF), (2, 0x00FF00FF), (1, 0x0F0F0F0F)):
        pairs = blocks.view(blocks.shape[0], 4 // distance, 2, distance, words.shape[1])
        low, high = pairs[:, :, 0], pairs[:, :, 1]
        swap = ((low >> (4 * distance)) ^ high) & mask
        high ^= swap
        low ^= swap << (4 * distance)
    return blocks
