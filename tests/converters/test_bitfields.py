"""Bit fields against streams of single bits, and words worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from converters.formats.bitfields import (
    add_one_to_words,
    transpose_nibbles,
    unpack_columns,
    unpack_rows,
    widen_rows,
)
from quant_kernels.packing import unpack_codes
from tests.converters.reference import awq_pack, pack, unpack

RANDOM = np.random.default_rng(1)


def words(*values: int) -> torch.Tensor:
    return torch.from_numpy(np.array(values, dtype=np.uint32).view(np.int32))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_unpack_rows_and_columns_agree_with_a_bit_stream(bits: int) -> None:
    codes = RANDOM.integers(0, 2**bits, (96, 7))
    packed = pack(codes.T, bits)
    assert np.array_equal(unpack_rows(torch.from_numpy(packed.T.copy()), bits).numpy(), codes)
    assert np.array_equal(unpack_columns(torch.from_numpy(packed), bits).numpy(), codes.T)
    assert np.array_equal(unpack(packed, bits), codes.T)


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        (8, [1, 2, 3, 200], [0xC8030201]),
        (2, [0, 1, 2, 3] * 4, [0xE4E4E4E4]),
        (3, [3 * i % 8 for i in range(32)], [0x98ABC398, 0xC398ABC3, 0xABC398AB]),
        (3, [3] * 32, [0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D]),
        (3, [4] * 32, [0x24924924, 0x49249249, 0x92492492]),
    ],
)
def test_worked_words(bits: int, codes: list[int], expected: list[int]) -> None:
    assert unpack_rows(words(*expected).view(-1, 1), bits).flatten().tolist() == codes


def test_one_is_added_to_whole_words_with_their_borrows() -> None:
    zeros = [5, 0, 7, 8, 9, 3, 0, 2]
    restored = add_one_to_words(words(0x0F2875F4, 0xFFFFFFFF).view(1, 2), 4)
    assert restored.numpy().view(np.uint32).tolist() == [[0x20398705, 0x11111110]]
    assert unpack_columns(restored, 4)[0, :8].tolist() == zeros


@pytest.mark.parametrize("bits", [2, 3])
def test_widening_keeps_every_code(bits: int) -> None:
    codes = RANDOM.integers(0, 2**bits, (64, 2050))
    widened = widen_rows(torch.from_numpy(pack(codes.T, bits).T.copy()), bits)
    assert np.array_equal(unpack_codes(widened, 4).numpy(), codes)


def test_transposed_nibbles() -> None:
    codes = RANDOM.integers(0, 16, (24, 40))
    blocks = transpose_nibbles(torch.from_numpy(pack(codes, 4)))
    for nibble in range(8):
        rows = unpack_codes(blocks[:, nibble].contiguous(), 4).numpy()
        assert np.array_equal(rows, codes[:, nibble::8])


def test_awq_order_by_hand() -> None:
    assert awq_pack(np.arange(8).reshape(1, 8)).view(np.uint32).tolist() == [[0x75316420]]
