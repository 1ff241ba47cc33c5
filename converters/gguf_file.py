"""GGUF files, versions 2 and 3, little endian: metadata and tensor table, and raw tensor bytes.

    | "GGUF" | u32 version | u64 tensors | u64 pairs | pairs ... | tensor infos ... | padding | data |
    string = u64 length, UTF-8        pair = string key, u32 type, value        array = u32 item type, u64 count, items
    tensor info = string name, u32 n_dims, u64 dims (fastest first), u32 type, u64 offset from the data's start

Invariant: no declared length or count is followed before it was checked against the bytes that are left, and what is
kept in memory is bounded by the file's own size and by caps on the head and on array items. Arrays of arrays, which no
model file has, are refused. It knows how many bytes a block type takes, not what they mean: see `formats.gguf`.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from converters.errors import CheckpointError
from converters.files import DataFile, shown
from converters.report import shape_text

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_PAIRS = 2**16
#: Items of all arrays together; the largest vocabularies have some 300,000 tokens with two numbers each, and 500,000
#: merges.
MAX_ARRAY_ITEMS = 2**21
MAX_NAME_BYTES = 2**16
#: Metadata and tensor table; a vocabulary of 260,000 with merges takes about 15 MB.
MAX_HEAD_BYTES = 2**26
_MAX_DIMS = 4
_READ_BYTES = 2**20
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: ("<B", 1),
    1: ("<b", 1),
    2: ("<H", 2),
    3: ("<h", 2),
    4: ("<I", 4),
    5: ("<i", 4),
    6: ("<f", 4),
    7: ("<?", 1),
    10: ("<Q", 8),
    11: ("<q", 8),
    12: ("<d", 8),
}


@dataclass(frozen=True, slots=True)
class BlockType:
    """A ggml type: `block_len` values take `block_bytes` bytes."""

    name: str
    block_len: int
    block_bytes: int


BLOCK_TYPES: Mapping[int, BlockType] = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    9: BlockType("Q8_1", 32, 36),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    15: BlockType("Q8_K", 256, 292),
    16: BlockType("IQ2_XXS", 256, 66),
    17: BlockType("IQ2_XS", 256, 74),
    18: BlockType("IQ3_XXS", 256, 98),
    19: BlockType("IQ1_S", 256, 50),
    20: BlockType("IQ4_NL", 32, 18),
    21: BlockType("IQ3_S", 256, 110),
    22: BlockType("IQ2_S", 256, 82),
    23: BlockType("IQ4_XS", 256, 136),
    24: BlockType("I8", 1, 1),
    25: BlockType("I16", 1, 2),
    26: BlockType("I32", 1, 4),
    27: BlockType("I64", 1, 8),
    28: BlockType("F64", 1, 8),
    29: BlockType("IQ1_M", 256, 56),
    30: BlockType("BF16", 1, 2),
    34: BlockType("TQ1_0", 256, 54),
    35: BlockType("TQ2_0", 256, 66),
    39: BlockType("MXFP4", 32, 17),
    40: BlockType("NVFP4", 64, 36),
    41: BlockType("Q1_0", 128, 18),
}


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor: `shape` slowest dimension first ([out, in] for a linear), `num_bytes` at `offset` of `file`."""

    name: str
    type: BlockType
    shape: tuple[int, ...]
    file: DataFile
    offset: int
    num_bytes: int

    @property
    def num_rows(self) -> int:
        """Rows along the fastest dimension; each is a whole number of blocks."""
        return prod(self.shape[:-1])

    def __str__(self) -> str:
        return shape_text(self.type.name, self.shape)


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """A parsed file, or all files of a split model as one."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]


def open_gguf(path: Path) -> GGUFFile:
    """Read the metadata and the tensor table; of a split model, those of all parts.

    Raises:
        CheckpointError: naming the file, what was found and what was expected.
    """
    first = _parse(path)
    count = first.metadata.get("split.count", 0)
    if not isinstance(count, int) or count <= 1:
        return first
    return _join_parts(first, count)


def _join_parts(opened: GGUFFile, count: int) -> GGUFFile:
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", opened.path.name)
    if match is None or int(match[3]) != count:
        raise CheckpointError(
            f"{opened.path}: one of {count} parts, expected a name like model-00001-of-{count:05d}.gguf; "
            "keep the names that the parts were published with"
        )
    tensors: dict[str, GGUFTensor] = {}
    metadata: Mapping[str, Any] = {}
    for number in range(1, count + 1):
        path = opened.path.with_name(f"{match[1]}-{number:05d}-of-{count:05d}.gguf")
        if not path.is_file():
            raise CheckpointError(f"{path}: missing; it is part {number} of {count} of this model")
        part = opened if path == opened.path else _parse(path)
        if part.metadata.get("split.no") != number - 1 or part.metadata.get("split.count") != count:
            raise CheckpointError(f"{path}: does not say that it is part {number} of {count}; another model's file?")
        twice = tensors.keys() & part.tensors.keys()
        if twice:
            raise CheckpointError(f"{path}: tensor '{shown(min(twice))}' is in an earlier part too")
        tensors.update(part.tensors)
        metadata = metadata or part.metadata
    total = metadata.get("split.tensors.count")
    if isinstance(total, int) and total != len(tensors):
        raise CheckpointError(f"{opened.path}: the parts hold {len(tensors)} tensors, expected {total}")
    return GGUFFile(opened.path, metadata, tensors)


def _parse(path: Path) -> GGUFFile:
    return _Parser(DataFile.at(path)).parse()


class _Parser:
    """A cursor over the head of a file that never trusts a length."""

    def __init__(self, file: DataFile) -> None:
        self.file = file
        self.size = file.num_bytes
        self.buffer = bytearray()
        self.position = 0
        self.num_items = 0

    def parse(self) -> GGUFFile:
        num_tensors, num_pairs = self._head()
        metadata: dict[str, Any] = {}
        for _ in range(num_pairs):
            key = self._string("a metadata key", MAX_NAME_BYTES)
            if key in metadata:
                raise self._refuse(f"metadata key '{shown(key)}' appears twice")
            metadata[key] = self._value(self._scalar(4), key)
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 2**20 or alignment & (alignment - 1):
            raise self._refuse(f"general.alignment is {alignment!r}, expected a power of two")
        infos = [self._tensor_info() for _ in range(num_tensors)]
        data_start = -(-self.position // alignment) * alignment
        return GGUFFile(self.file.path, metadata, self._place(infos, data_start, alignment))

    def _head(self) -> tuple[int, int]:
        magic = self._take(4, "the magic bytes")
        if magic != MAGIC:
            raise self._refuse(f"begins with {bytes(magic)!r}, expected {MAGIC!r}: no GGUF file")
        version = self._scalar(4)
        if version not in VERSIONS:
            if version in (v << 24 for v in VERSIONS):
                raise self._refuse("big-endian GGUF is not supported; convert it on a little-endian machine")
            raise self._refuse(f"GGUF version {version}, supported are {VERSIONS}")
        num_tensors, num_pairs = self._scalar(10), self._scalar(10)
        # The smallest tensor info takes 28 bytes, the smallest pair 13.
        for name, count, least in (("tensors", num_tensors, 28), ("metadata pairs", num_pairs, 13)):
            if count * least > self.size:
                raise self._refuse(f"declares {count} {name}, more than its {self.size} bytes can hold")
        if num_pairs > MAX_PAIRS:
            raise self._refuse(f"declares {num_pairs} metadata pairs, at most {MAX_PAIRS} are read")
        return num_tensors, num_pairs

    def _refuse(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.file.path}: {reason}")

    # Bytes

    def _need(self, count: int, what: str) -> None:
        """Have `count` bytes from the cursor on in the buffer."""
        end = self.position + count
        if end > self.size:
            raise self._refuse(f"{what} needs {count} bytes at {self.position}, but the file ends at {self.size}")
        if end > MAX_HEAD_BYTES:
            raise self._refuse(f"{what} ends at byte {end}; at most {MAX_HEAD_BYTES} bytes of metadata are read")
        have = len(self.buffer)
        if have < end:
            # Doubling keeps the number of reads small however long the head is.
            wanted = min(max(_READ_BYTES, have, end - have), self.size - have)
            self.buffer += self.file.read_bytes(have, wanted)

    def _take(self, count: int, what: str) -> bytes:
        self._need(count, what)
        start = self.position
        self.position += count
        return bytes(self.buffer[start : self.position])

    def _scalar(self, kind: int) -> Any:
        layout, size = _SCALARS[kind]
        self._need(size, "a number")
        (value,) = struct.unpack_from(layout, self.buffer, self.position)
        self.position += size
        return value

    def _string(self, what: str, max_bytes: int | None = None) -> str:
        length = self._scalar(10)
        if max_bytes is not None and length > max_bytes:
            raise self._refuse(f"{what} declares {length} bytes, at most {max_bytes} are read")
        return self._decode(self._take(length, what), what)

    def _decode(self, data: bytes, what: str) -> str:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._refuse(f"{what} is not UTF-8: {error.reason}") from error

    # Values

    def _value(self, kind: int, key: str) -> Any:
        what = f"metadata '{shown(key)}'"
        if kind == _STRING:
            return self._string(what)
        if kind == _ARRAY:
            return self._array(what)
        if kind not in _SCALARS:
            raise self._refuse(f"{what} has value type {kind}, expected 0 to 12")
        return self._scalar(kind)

    def _array(self, what: str) -> list[Any]:
        kind, count = self._scalar(4), self._scalar(10)
        self.num_items += count
        if self.num_items > MAX_ARRAY_ITEMS:
            raise self._refuse(f"{what} declares {count} items, at most {MAX_ARRAY_ITEMS} are read from a file")
        if kind == _STRING:
            return self._string_array(count, what)
        if kind not in _SCALARS:
            raise self._refuse(f"{what} is an array of type {kind}, expected numbers, booleans or strings")
        layout, size = _SCALARS[kind]
        self._need(count * size, what)
        dtype = np.dtype(np.bool_ if layout == "<?" else layout)
        values: list[Any] = np.frombuffer(self.buffer, dtype, count, self.position).tolist()
        self.position += count * size
        return values

    def _string_array(self, count: int, what: str) -> list[str]:
        """Strings one after the other. A vocabulary has some 100,000, so this loop is written for speed."""
        if count * 8 > self.size - self.position:
            raise self._refuse(f"{what} declares {count} strings, more than the file can hold")
        length_at = struct.Struct("<Q").unpack_from
        strings: list[str] = []
        append: Callable[[str], None] = strings.append
        position, buffer = self.position, self.buffer
        for _ in range(count):
            if position + 8 > len(buffer):
                self.position = position
                self._need(8, what)
            end = position + 8 + length_at(buffer, position)[0]
            if end > len(buffer):
                self.position = position + 8
                self._need(end - self.position, what)
            append(self._decode(bytes(buffer[position + 8 : end]), what))
            position = end
        self.position = position
        return strings

    # Tensors

    def _tensor_info(self) -> tuple[str, BlockType, tuple[int, ...], int]:
        name = self._string("a tensor name", MAX_NAME_BYTES)
        num_dims = self._scalar(4)
        if not 1 <= num_dims <= _MAX_DIMS:
            raise self._refuse(f"tensor '{shown(name)}' has {num_dims} dimensions, expected 1 to {_MAX_DIMS}")
        dims = tuple(self._scalar(10) for _ in range(num_dims))
        kind, offset = self._scalar(4), self._scalar(10)
        block = BLOCK_TYPES.get(kind)
        if block is None:
            raise self._refuse(f"tensor '{shown(name)}' has ggml type {kind}, which is not known")
        if not all(dims) or dims[0] % block.block_len:
            raise self._refuse(
                f"tensor '{shown(name)}' has dimensions {dims}, expected rows of whole {block.name} blocks "
                f"({block.block_len} values)"
            )
        return name, block, dims[::-1], offset

    def _place(
        self, infos: list[tuple[str, BlockType, tuple[int, ...], int]], data_start: int, alignment: int
    ) -> dict[str, GGUFTensor]:
        """Tensors with their place in the file, which must be aligned, inside, and their own alone."""
        tensors: dict[str, GGUFTensor] = {}
        position = 0
        for name, block, shape, offset in sorted(infos, key=lambda info: info[3]):
            num_bytes = prod(shape) // block.block_len * block.block_bytes
            if name in tensors:
                raise self._refuse(f"tensor '{shown(name)}' appears twice")
            if offset % alignment:
                raise self._refuse(f"tensor '{shown(name)}' lies at {offset}, which is not aligned to {alignment}")
            if offset < position:
                raise self._refuse(f"tensor '{shown(name)}' at {offset} overlaps the one before it")
            if data_start + offset + num_bytes > self.size:
                raise self._refuse(
                    f"tensor '{shown(name)}' ends at byte {data_start + offset + num_bytes}, but the file has "
                    f"{self.size}; download it again"
                )
            tensors[name] = GGUFTensor(name, block, shape, self.file, data_start + offset, num_bytes)
            position = offset + num_bytes
        return tensors
