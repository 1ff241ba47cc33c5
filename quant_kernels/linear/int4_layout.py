"""torch's CPU layout of 4-bit codes, written straight from packed words.

torch's own converter wants one int32 per code, which takes eight times the memory and some fifteen times the time. Its
layout depends on the processor: for each block of B columns (64 with AVX-512, 32 with AVX2), row by row of K,

    | column 0 and B/2 | column 1 and B/2 + 1 | ... | column B/2 - 1 and B - 1 |     a byte each, low nibble and high

Invariant: `block_columns` asks torch which of these it uses, by packing a sample both ways; where it is neither, there
is None and torch's converter must be used.
"""

from __future__ import annotations

import torch

from quant_kernels.packing import pack_codes

_BLOCKS = (64, 32)
_LOW_NIBBLES = 0x0F0F0F0F
_HIGH_NIBBLES = -0x0F0F0F10
#: Words that are rearranged at a time: what a core's cache holds.
_WORDS_AT_ONCE = 2**17


def block_columns() -> int | None:
    """Columns of a block in the layout that this torch uses on this machine; None if it is not one that is known."""
    codes = torch.randint(0, 16, (128, 32), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    expected = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    words = pack_codes(codes.t(), 4)
    for block in _BLOCKS:
        found = torch.empty(128, 16, dtype=torch.uint8)
        write(words, 4, block, found)
        if torch.equal(found.flatten(), expected.flatten()):
            return block
    return None


def write(words: torch.Tensor, bits: int, block: int, packed: torch.Tensor) -> None:
    """Rearrange codes: int32 words [K * bits / 32, N] into uint8 [N, P * K / 2], N whole blocks.

    P is 1 for 4 bits; 8 bits are two planes along K, the high one first.
    """
    num_words, num_columns = words.shape
    half = block // 2
    columns = max(1, _WORDS_AT_ONCE // (num_words * block)) * block
    for first in range(0, num_columns, columns):
        target = packed[first : first + columns]
        pairs = words[:, first : first + columns].reshape(num_words, -1, 2, half).transpose(0, 1).contiguous()
        low, high = pairs.unbind(2)
        even = (low & _LOW_NIBBLES).bitwise_or_((high & _LOW_NIBBLES).bitwise_left_shift_(4))
        odd = (low >> 4).bitwise_and_(_LOW_NIBBLES).bitwise_or_(high & _HIGH_NIBBLES)
        # Byte t of a word of `even` is row 8 r + 2 t of 4-bit codes, or the low plane's row 4 r + t of 8-bit ones.
        parts = torch.stack((even, odd) if bits == 4 else (odd, even)).view(torch.uint8)
        parts = parts.view(2, -1, num_words, half, 4)
        if bits == 4:
            target.view(-1, num_words, 4, 2, half).copy_(parts.permute(1, 2, 4, 0, 3))
        else:
            target.view(-1, 2, num_words, 4, half).copy_(parts.permute(1, 0, 2, 4, 3))
