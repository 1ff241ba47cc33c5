"""GGUF blocks to PackedWeight.

Blocks of 32 values run along the inputs; fp16 fields are little endian::

    Q4_0   | d f16 | 16 bytes |            W = d * (q - 8)     low nibbles are values 0..15, high ones 16..31
    Q4_1   | d f16 | m f16 | 16 bytes |    W = d * q + m
    Q8_0   | d f16 | 32 signed bytes |     W = d * q

Invariant: codes, scales and mins keep their bits; only their places change. Rows are converted some at a time, so that
beside the result no more than a few MB are in memory. The CPU kernels' library does it on all cores where it was built.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch

from converters.formats.base import require_finite
from converters.formats.gguf_headers import BLOCK, PACKINGS
from converters.gguf_file import GGUFTensor
from converters.read_ahead import ByteRange, Reader
from quant_kernels.native.binding import load as load_native
from quant_kernels.packed_weight import DenseWeight, PackedWeight

_TORCH: Mapping[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
#: Raw bytes that are converted at a time.
_CHUNK_BYTES = 4 * 2**20
_Bytes = npt.NDArray[np.uint8]


def read_linear(
    tensor: GGUFTensor, row_order: torch.Tensor | None, bias: torch.Tensor | None, reader: Reader
) -> PackedWeight | DenseWeight:
    """One linear [out, in] of a supported type; its output i is stored row ``row_order[i]``.

    Raises:
        CheckpointError: if scales or mins are not finite, or the file cannot be read.
    """
    packing = PACKINGS.get(tensor.type.name)
    if packing is None:
        weight = read_tensor(tensor, reader)
        return DenseWeight(weight if row_order is None else weight[row_order], bias)
    out_features, in_features = tensor.shape
    num_groups = in_features // BLOCK
    codes = torch.empty(in_features * packing.bits // 32, out_features, dtype=torch.int32)
    scales = torch.empty(num_groups, out_features, dtype=torch.float16)
    mins = torch.empty_like(scales) if packing.zero_point is None else None
    library, _ = load_native()
    for rows, blocks in _chunks(tensor, reader):
        if library is not None:
            parts = (codes[:, rows], scales[:, rows], None if mins is None else mins[:, rows])
            library.unblock(torch.from_numpy(blocks), packing.bits, *parts)
            continue
        codes[:, rows] = torch.from_numpy(_words(blocks[..., packing.head_bytes :], packing.bits)).t()
        scales[:, rows] = _halves(blocks, 0).t()
        if mins is not None:
            mins[:, rows] = _halves(blocks, 2).t()
    for table in (scales, mins):
        if table is not None:
            require_finite(table, str(tensor.file.path), tensor.name)
    if row_order is not None:
        codes, scales = codes[:, row_order], scales[:, row_order]
        mins = None if mins is None else mins[:, row_order]
    return PackedWeight(
        bits=packing.bits,
        codes=codes,
        scales=scales,
        group_size=BLOCK,
        in_features=in_features,
        out_features=out_features,
        zero_const=packing.zero_point,
        mins=mins,
        bias=bias,
        origin={"format": "gguf", "type": tensor.type.name},
    )


def read_tensor(tensor: GGUFTensor, reader: Reader) -> torch.Tensor:
    """A tensor of a supported type in its own shape: in the file's float dtype, or float32 where blocks are expanded.

    Raises:
        CheckpointError: if a scale is not finite, or the file cannot be read.
    """
    packing = PACKINGS.get(tensor.type.name)
    if packing is None:
        [whole] = ranges(tensor)
        return torch.from_numpy(reader.read(whole)).view(_TORCH[tensor.type.name]).view(tensor.shape)
    values = torch.empty(tensor.num_rows, tensor.shape[-1] // BLOCK, BLOCK)
    for rows, blocks in _chunks(tensor, reader):
        part = values[rows]
        scales = _halves(blocks, 0).float()
        require_finite(scales, str(tensor.file.path), tensor.name)
        part.copy_(_codes(blocks[..., packing.head_bytes :], packing.bits))
        if packing.zero_point is not None:
            part.sub_(packing.zero_point).mul_(scales.unsqueeze(-1))
        else:
            part.mul_(scales.unsqueeze(-1)).add_(_halves(blocks, 2).float().unsqueeze(-1))
    return values.view(tensor.shape)


def ranges(tensor: GGUFTensor) -> list[ByteRange]:
    """What is read at a time: rows that are converted together, or the whole of what is not converted."""
    if tensor.type.name not in PACKINGS:
        return [ByteRange(tensor.file, tensor.offset, tensor.num_bytes)]
    row_bytes = tensor.num_bytes // tensor.num_rows
    step = max(1, _CHUNK_BYTES // row_bytes)
    return [
        ByteRange(tensor.file, tensor.offset + row * row_bytes, min(step, tensor.num_rows - row) * row_bytes)
        for row in range(0, tensor.num_rows, step)
    ]


def _chunks(tensor: GGUFTensor, reader: Reader) -> Iterator[tuple[slice, _Bytes]]:
    """Rows of the tensor, and their blocks as uint8 [rows, groups, bytes per block]."""
    row_bytes = tensor.num_bytes // tensor.num_rows
    first = 0
    for part in ranges(tensor):
        count = part.num_bytes // row_bytes
        yield slice(first, first + count), reader.read(part).reshape(count, -1, tensor.type.block_bytes)
        first += count


def _halves(blocks: _Bytes, start: int) -> torch.Tensor:
    """The fp16 at byte `start` of every block, [rows, groups]."""
    return torch.from_numpy(np.ascontiguousarray(blocks[..., start : start + 2]).view("<f2")[..., 0])


def _words(stored: _Bytes, bits: int) -> npt.NDArray[np.int32]:
    """The codes of blocks [rows, groups, bytes] as words [rows, in * bits / 32], LSB first along the inputs."""
    rows = len(stored)
    words: npt.NDArray[np.int32]
    if bits == 8:
        # Signed codes are kept with an offset of 128: flipping the top bit adds it.
        words = (stored ^ np.uint8(0x80)).view("<i4")
    else:
        pairs = np.ascontiguousarray(stored).view("<u8")
        words = np.concatenate([_squeeze_nibbles(pairs), _squeeze_nibbles(pairs >> np.uint64(4))], axis=-1)
    return words.reshape(rows, -1)


def _squeeze_nibbles(pairs: npt.NDArray[np.uint64]) -> npt.NDArray[np.int32]:
    """The low nibbles of eight bytes, side by side in 32 bits: three rounds of closing every second gap."""
    packed = pairs & np.uint64(0x0F0F0F0F0F0F0F0F)
    for shift, mask in ((4, 0x00FF00FF00FF00FF), (8, 0x0000FFFF0000FFFF), (16, 0x00000000FFFFFFFF)):
        packed = (packed | (packed >> np.uint64(shift))) & np.uint64(mask)
    words: npt.NDArray[np.int32] = packed.astype(np.uint32).view(np.int32)
    return words


def _codes(stored: _Bytes, bits: int) -> torch.Tensor:
    """The codes of blocks [rows, groups, bytes] as uint8 [rows, groups, 32]."""
    if bits == 8:
        return torch.from_numpy(stored ^ np.uint8(0x80))
    return torch.from_numpy(np.concatenate([stored & np.uint8(15), stored >> np.uint8(4)], axis=-1))
