"""GGUF files, versions 2 and 3, little endian: metadata and tensor table, and raw tensor bytes.

    | "GGUF" | u32 version | u64 tensors | u64 pairs | pairs ... | tensor infos ... | padding | data |
    string = u64 length, UTF-8        pair = string key, u32 type, value        array = u32 item type, u64 count, items
    tensor info = string name, u32 n_dims, u64 dims (fastest first), u32 type, u64 offset from the data's start

Invariant: no declared length or count is followed before it was checked against the bytes that are left, and what is
kept in memory is bounded by the file's own size and by caps on the head, on its values and on its tensors, of all parts
together. Arrays of arrays, which no model file has, are refused. It knows how many bytes a block type takes, not what
they mean: see `formats.gguf`.
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
from converters.files import DataFile, is_inside, shown
from converters.report import shape_text

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_PAIRS = 2**16
#: A model of 126 layers has some 1,200.
MAX_TENSORS = 2**16
MAX_NAME_BYTES = 2**16
#: A single string; the longest are chat templates, of some 20 KB.
MAX_STRING_BYTES = 2**20
#: Metadata and tensor table; a vocabulary of 260,000 with merges takes about 16 MB.
MAX_HEAD_BYTES = 2**25
#: What all values may take in memory, by the two costs below. Some 260,000 tokens with two numbers each and 500,000
#: merges, as much as the largest vocabularies have, count as 146 MB.
MAX_VALUE_BYTES = 5 * 2**25
#: Bytes of a str in a list, beside four (the widest character of Python's) for each byte of it and of its length.
_STRING_BYTES = 56
#: Bytes of an int or float in a list, twice: there is also what it is read from.
_NUMBER_BYTES = 80
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
    """A parsed file, or all files of a split model as one. `head_bytes`: what lies before the tensors' data."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]
    head_bytes: int


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
    head_bytes = 0
    for number in range(1, count + 1):
        path = opened.path.with_name(f"{match[1]}-{number:05d}-of-{count:05d}.gguf")
        if not path.is_file():
            raise CheckpointError(f"{path}: missing; it is part {number} of {count} of this model")
        if path != opened.path and not (is_inside(path) or path.resolve().parent == opened.path.resolve().parent):
            raise CheckpointError(f"{path}: a link to a file that does not lie beside the others; put the file there")
        part = opened if path == opened.path else _parse(path)
        if part.metadata.get("split.no") != number - 1 or part.metadata.get("split.count") != count:
            raise CheckpointError(f"{path}: does not say that it is part {number} of {count}; another model's file?")
        twice = tensors.keys() & part.tensors.keys()
        if twice:
            raise CheckpointError(f"{path}: tensor '{shown(min(twice))}' is in an earlier part too")
        tensors.update(part.tensors)
        head_bytes += part.head_bytes
        if len(tensors) > MAX_TENSORS or head_bytes > MAX_HEAD_BYTES:
            raise CheckpointError(
                f"{path}: the parts up to this one hold {len(tensors)} tensors and {head_bytes} bytes of metadata, at "
                f"most {MAX_TENSORS} and {MAX_HEAD_BYTES} are read"
            )
        metadata = metadata or part.metadata
    total = metadata.get("split.tensors.count")
    if isinstance(total, int) and total != len(tensors):
        raise CheckpointError(f"{opened.path}: the parts hold {len(tensors)} tensors, expected {total}")
    return GGUFFile(opened.path, metadata, tensors, head_bytes)


def _parse(path: Path) -> GGUFFile:
    return _Parser(DataFile.at(path)).parse()


class _Parser:
    """A cursor over the head of a file that never trusts a length."""

    def __init__(self, file: DataFile) -> None:
        self.file = file
        self.size = file.num_bytes
        # The bytes of the file from `start` on that have been read and not been parsed yet.
        self.buffer = bytearray()
        self.start = 0
        self.position = 0
        self.value_bytes = 0

    def parse(self) -> GGUFFile:
        num_tensors, num_pairs = self._head()
        metadata: dict[str, Any] = {}
        for _ in range(num_pairs):
            key = self._string("a metadata key", MAX_NAME_BYTES)
            if key in metadata:
                raise self._refuse(f"metadata key '{shown(key)}' appears twice")
            metadata[key] = self._value(self._scalar(4), f"metadata '{shown(key)}'")
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 2**20 or alignment & (alignment - 1):
            raise self._refuse(f"general.alignment is {shown(alignment)}, expected a power of two")
        infos = [self._tensor_info() for _ in range(num_tensors)]
        data_start = -(-self.position // alignment) * alignment
        return GGUFFile(self.file.path, metadata, self._place(infos, data_start, alignment), self.position)

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
        for name, count, most in (("tensors", num_tensors, MAX_TENSORS), ("metadata pairs", num_pairs, MAX_PAIRS)):
            if count > most:
                raise self._refuse(f"declares {count} {name}, at most {most} are read")
        return num_tensors, num_pairs

    def _refuse(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.file.path}: {reason}")

    # Bytes

    def _need(self, count: int, what: str) -> int:
        """Have `count` bytes from the cursor on in the buffer: the place there of the first."""
        end = self.position + count
        if end > self.size:
            raise self._refuse(f"{what} needs {count} bytes at {self.position}, but the file ends at {self.size}")
        if end > MAX_HEAD_BYTES:
            raise self._refuse(f"{what} ends at byte {end}; at most {MAX_HEAD_BYTES} bytes of metadata are read")
        have = self.start + len(self.buffer)
        if have < end:
            del self.buffer[: self.position - self.start]
            self.start = self.position
            self.buffer += self.file.read(have, min(max(_READ_BYTES, end - have), self.size - have)).data
        return self.position - self.start

    def _take(self, count: int, what: str) -> bytes:
        begin = self._need(count, what)
        self.position += count
        return bytes(self.buffer[begin : begin + count])

    def _scalar(self, kind: int) -> Any:
        layout, size = _SCALARS[kind]
        (value,) = struct.unpack_from(layout, self.buffer, self._need(size, "a number"))
        self.position += size
        return value

    def _string(self, what: str, max_bytes: int) -> str:
        length = self._scalar(10)
        if length > max_bytes:
            raise self._refuse(f"{what} declares {length} bytes, at most {max_bytes} are read")
        self._charge(_STRING_BYTES + 4 * (8 + length), what)
        try:
            return self._take(length, what).decode()
        except UnicodeDecodeError as error:
            raise self._refuse(f"{what} is not UTF-8: {error.reason}") from error

    # Values

    def _charge(self, num_bytes: int, what: str) -> None:
        """Count what a value takes in memory, before it takes it."""
        self.value_bytes += num_bytes
        if self.value_bytes > MAX_VALUE_BYTES:
            raise self._refuse(f"{what} is too much: the values up to it take more than {MAX_VALUE_BYTES} bytes")

    def _value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self._string(what, MAX_STRING_BYTES)
        if kind == _ARRAY:
            return self._array(what)
        if kind not in _SCALARS:
            raise self._refuse(f"{what} has value type {kind}, expected 0 to 12")
        return self._scalar(kind)

    def _array(self, what: str) -> list[Any]:
        kind, count = self._scalar(4), self._scalar(10)
        if kind == _STRING:
            return self._string_array(count, what)
        if kind not in _SCALARS:
            raise self._refuse(f"{what} is an array of type {kind}, expected numbers, booleans or strings")
        self._charge(_NUMBER_BYTES * count, f"{what}, of {count} items,")
        layout, size = _SCALARS[kind]
        begin = self._need(count * size, what)
        dtype = np.dtype(np.bool_ if layout == "<?" else layout)
        values: list[Any] = np.frombuffer(self.buffer, dtype, count, begin).tolist()
        self.position += count * size
        return values

    def _string_array(self, count: int, what: str) -> list[str]:
        """Strings one after the other. A vocabulary has some 100,000, so this loop is written for speed."""
        if count * 8 > self.size - self.position:
            raise self._refuse(f"{what} declares {count} strings, more than the file can hold")
        self._charge(_STRING_BYTES * count, f"{what}, of {count} strings,")
        length_at = struct.Struct("<Q").unpack_from
        strings: list[str] = []
        append: Callable[[str], None] = strings.append
        buffer, at, have = self.buffer, self.position - self.start, len(self.buffer)
        try:
            for _ in range(count):
                begin = at + 8
                end = begin + length_at(buffer, at)[0] if begin <= have else have + 1
                if end > have:
                    self._move_to(at, what)
                    begin, end = self._next_string(what)
                    have = len(buffer)
                append(buffer[begin:end].decode())
                at = end
        except UnicodeDecodeError as error:
            raise self._refuse(f"{what} is not UTF-8: {error.reason}") from error
        self._move_to(at, what)
        return strings

    def _move_to(self, at: int, what: str) -> None:
        """Put the cursor at this place in the buffer, behind strings that have not been charged yet."""
        position = self.start + at
        self._charge(4 * (position - self.position), what)
        self.position = position

    def _next_string(self, what: str) -> tuple[int, int]:
        """Have the string at the cursor in the buffer: where it begins and ends there."""
        (length,) = struct.unpack_from("<Q", self.buffer, self._need(8, what))
        begin = self._need(8 + length, what) + 8
        return begin, begin + length

    # Tensors

    def _tensor_info(self) -> tuple[str, BlockType, tuple[int, ...], int]:
        name = self._string("a tensor name", MAX_NAME_BYTES)
        num_dims = self._scalar(4)
        if not 1 <= num_dims <= _MAX_DIMS:
            raise self._refuse(f"tensor '{shown(name)}' has {num_dims} dimensions, expected 1 to {_MAX_DIMS}")
        layout = struct.Struct(f"<{num_dims}QIQ")
        *dims, kind, offset = layout.unpack(self._take(layout.size, f"tensor '{shown(name)}'"))
        block = BLOCK_TYPES.get(kind)
        if block is None:
            raise self._refuse(f"tensor '{shown(name)}' has ggml type {kind}, which is not known")
        if not all(dims) or dims[0] % block.block_len:
            raise self._refuse(
                f"tensor '{shown(name)}' has dimensions {tuple(dims)}, expected rows of whole {block.name} blocks "
                f"({block.block_len} values)"
            )
        # Where the data begin is not known yet, but some things are too large wherever it is.
        end = self.position + offset + prod(dims) // block.block_len * block.block_bytes
        if end > self.size:
            raise self._refuse_end(name, end)
        return name, block, tuple(reversed(dims)), offset

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
                raise self._refuse_end(name, data_start + offset + num_bytes)
            tensors[name] = GGUFTensor(name, block, shape, self.file, data_start + offset, num_bytes)
            position = offset + num_bytes
        return tensors

    def _refuse_end(self, name: str, end: int) -> CheckpointError:
        return self._refuse(
            f"tensor '{shown(name)}' ends at byte {end} or later, but the file has {self.size}; download it again"
        )
