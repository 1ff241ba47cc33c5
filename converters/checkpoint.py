"""Safetensors files: one, or several under an index, read by tensor name.

A file is an 8-byte little-endian length, that many bytes of JSON, and the tensors' bytes::

    | u64 n | {"name": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}, ...} | data ... |

Invariant: when `open_folder` returns, every tensor lies inside its file, the data section is covered exactly once
without holes, and shape times dtype is the byte length; so a read cannot fail but for the disk. Headers alone are read
here, without torch; `tensors` reads what they describe.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError
from converters.files import DataFile, is_inside, list_folder, parse_json_object, read_json_object, shown
from converters.report import shape_text

#: A header of 30,000 tensors, or an index of 100,000; the format itself allows 100 MB.
MAX_HEADER_BYTES = 8 * 2**20
#: Of all files together. Unquantized models have some 1,200 at the most, quantized ones four times as many.
MAX_TENSORS = 2**17
#: Of the string metadata of all files together; they say a few words about the quantization.
MAX_METADATA_CHARS = 2**20
SUFFIX = ".safetensors"
_INDEX_SUFFIX = SUFFIX + ".index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
#: PyTorch's own training files are no weights, though pickled like them.
_NOT_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth")
_LENGTH_BYTES = 8
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of one tensor; `offset` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: DataFile
    offset: int
    num_bytes: int

    def __str__(self) -> str:
        return shape_text(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of one file or of all shards, and the files' string metadata.

    Attributes:
        path: the folder.
        tensors: by name, over all shards.
        metadata: ``__metadata__`` of the headers, merged.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


def open_folder(folder: Path, stem: str | None = None) -> Checkpoint:
    """Read the headers of a folder's safetensors files.

    Args:
        stem: name without suffix of the weight file, where a config gives one.

    Raises:
        CheckpointError: if there is no such file, several that no index joins, or a header is broken.
    """
    names = list_folder(folder)
    index = None
    for candidate in [*([stem] if stem else []), "model"]:
        if candidate + SUFFIX in names:
            return _open_files(folder, [candidate + SUFFIX])
        if candidate + _INDEX_SUFFIX in names:
            index = candidate + _INDEX_SUFFIX
            break
    indexes = [name for name in names if name.endswith(_INDEX_SUFFIX)]
    index = index or (indexes[0] if len(indexes) == 1 else None)
    if index is not None:
        return _open_index(folder, index)
    files = [name for name in names if name.endswith(SUFFIX)]
    if len(files) != 1:
        raise CheckpointError(_no_single_file(folder, names, files))
    return _open_files(folder, files)


def has_safetensors(names: list[str]) -> bool:
    """Whether a folder with these entries holds safetensors weights, or the index of some."""
    return any(name.endswith((SUFFIX, _INDEX_SUFFIX)) for name in names)


def pickled_weights(names: list[str]) -> list[str]:
    """The entries that are pickled weights, which are never opened."""
    return [name for name in names if name.endswith(_PICKLES) and name not in _NOT_WEIGHTS]


def _no_single_file(folder: Path, names: list[str], files: list[str]) -> str:
    if not files:
        return f"{folder} holds no {SUFFIX} file; found: {shown(', '.join(names)) or 'nothing'}"
    return (
        f"{folder} holds {len(files)} {SUFFIX} files ({shown(', '.join(files))}) and no model{_INDEX_SUFFIX} to join "
        "them; keep the one to load, or download the index too"
    )


# Shards


def _open_index(folder: Path, name: str) -> Checkpoint:
    index = read_json_object(folder / name, max_bytes=MAX_HEADER_BYTES, unique_keys=True)
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise CheckpointError(f"{folder / name}: weight_map must map tensor names to file names")
    checkpoint = _open_files(folder, sorted(set(places.values())), named_by=name)
    for tensor, shard in places.items():
        info = checkpoint.tensors.get(tensor)
        if info is None or info.file.path.name != shard:
            raise CheckpointError(
                f"{folder / name} says that {shown(tensor)} is in {shown(shard)}, which lacks it; download both again"
            )
    return checkpoint


def _open_files(folder: Path, names: list[str], named_by: str | None = None) -> Checkpoint:
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    num_chars = 0
    for name in names:
        _check_inside(folder, name, named_by)
        infos, strings = read_header(DataFile.at(folder / name))
        # The texts of this file alone, for there may be thousands of files.
        num_chars += _num_chars(strings) - _num_chars({key: metadata[key] for key in strings if key in metadata})
        metadata.update(strings)
        if num_chars > MAX_METADATA_CHARS:
            raise CheckpointError(f"{folder}: __metadata__ up to {name} has more than {MAX_METADATA_CHARS} characters")
        if len(tensors) + len(infos) > MAX_TENSORS:
            raise CheckpointError(f"{folder}: the files up to {name} hold more than {MAX_TENSORS} tensors")
        for info in infos:
            if info.name in tensors:
                first = tensors[info.name].file.path.name
                raise CheckpointError(f"{folder}: {shown(info.name)} is in two files, {first} and {name}")
            tensors[info.name] = info
    return Checkpoint(folder, tensors, metadata)


def _num_chars(strings: Mapping[str, str]) -> int:
    return sum(len(key) + len(value) for key, value in strings.items())


def _check_inside(folder: Path, name: str, named_by: str | None) -> None:
    """A file, by itself or as an index names it, must be one of the folder itself, also after following links."""
    where = shown(folder / name) if named_by is None else f"{folder / named_by} names the shard '{shown(name)}'"
    if name in ("", ".", "..") or "\0" in name or Path(name).name != name:
        raise CheckpointError(f"{where}, expected the plain name of a file in the same folder")
    if not os.path.exists(folder / name):
        raise CheckpointError(f"{where}, which is not there; download the missing file")
    if not is_inside(folder / name):
        raise CheckpointError(f"{where}: it is a link to a file outside the folder; put the file itself there")


# One header


def read_header(file: DataFile) -> tuple[list[TensorInfo], dict[str, str]]:
    """Parse and check the header of one file: its tensors in file order, and its string metadata.

    Raises:
        CheckpointError: naming the file and the tensor at fault.
    """
    header_bytes = _header_bytes(file)
    raw = file.read_bytes(_LENGTH_BYTES, header_bytes)
    if not raw.startswith(b"{"):
        raise CheckpointError(f"{file.path}: the header begins with {raw[:1]!r}, expected '{{'")
    header = parse_json_object(raw, f"the header of {file.path}", unique_keys=True)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file.path}: __metadata__ must map names to strings")
    start = _LENGTH_BYTES + header_bytes
    infos = [_read_info(file, start, name, entry) for name, entry in header.items()]
    infos.sort(key=lambda info: (info.offset, info.num_bytes))
    _check_coverage(file, start, infos)
    return infos, metadata


def _header_bytes(file: DataFile) -> int:
    if file.num_bytes < _LENGTH_BYTES:
        raise CheckpointError(
            f"{file.path} has {file.num_bytes} bytes, too few for a safetensors header; download it again"
        )
    declared = int.from_bytes(file.read_bytes(0, _LENGTH_BYTES), "little")
    if declared > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{file.path} declares a header of {declared} bytes, at most {MAX_HEADER_BYTES} are allowed; "
            "it is broken, or no safetensors file"
        )
    if declared > file.num_bytes - _LENGTH_BYTES:
        raise CheckpointError(
            f"{file.path} declares a header of {declared} bytes but has {file.num_bytes} in all; download it again"
        )
    return declared


def _read_info(file: DataFile, start: int, name: str, entry: Any) -> TensorInfo:
    where = f"{file.path}: tensor {shown(name)}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(f"{where} needs dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise CheckpointError(f"{where} has the unknown dtype {shown(dtype)}")
    if not _are_sizes(shape):
        raise CheckpointError(f"{where} has shape {shown(shape)}, expected a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where} has data_offsets {shown(offsets)}, expected begin and end")
    begin, end = offsets
    if not begin <= end <= file.num_bytes - start:
        raise CheckpointError(
            f"{where} has data_offsets [{begin}, {end}], outside the {file.num_bytes - start} bytes of data; "
            "the file is cut short or broken, download it again"
        )
    num_bits = math.prod(shape) * _BITS[dtype]
    if num_bits != 8 * (end - begin):
        raise CheckpointError(f"{where}, {shape_text(dtype, shape)}, has {end - begin} bytes, which does not fit")
    return TensorInfo(name, dtype, tuple(shape), file, start + begin, end - begin)


def _are_sizes(value: object) -> bool:
    # Sizes beyond 2**63 cannot be real, and their product would be slow to compute.
    return (
        isinstance(value, list)
        and len(value) <= 32
        and all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**63 for v in value)
    )


def _check_coverage(file: DataFile, start: int, infos: list[TensorInfo]) -> None:
    """The tensors follow each other without gap or overlap up to the end of the file."""
    position = start
    for info in infos:
        if info.offset != position:
            kind = "overlaps the tensor before it" if info.offset < position else "leaves a hole before it"
            raise CheckpointError(f"{file.path}: the data of {shown(info.name)} {kind}")
        position += info.num_bytes
    if position != file.num_bytes:
        raise CheckpointError(
            f"{file.path} has {file.num_bytes} bytes but its tensors end at {position}; download it again"
        )
