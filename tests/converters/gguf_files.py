"""GGUF files written on the spot: sound ones by the ``gguf`` package, broken ones byte by byte."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter, quants

Tensors = Mapping[str, tuple[npt.NDArray[Any], GGMLQuantizationType]]


def write_gguf(
    path: Path,
    tensors: Tensors,
    arch: str = "llama",
    *,
    heads: int = 4,
    kv_heads: int = 2,
    hidden: int = 64,
    split_every: int = 0,
    more: Mapping[str, int | float | str] | None = None,
) -> Path:
    """A file with this architecture's metadata; blocks are given as bytes, floats as arrays. Returns `path`."""
    writer = GGUFWriter(path, arch, split_max_tensors=split_every)
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(2 * hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_vocab_size(40)
    for key, value in (more or {}).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_float32(key, value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_model(path: Path, kind: GGMLQuantizationType) -> Path:
    """A llama of one layer whose linears are of one kind."""
    rng = np.random.default_rng(0)

    def linear(rows: int, columns: int) -> tuple[npt.NDArray[Any], GGMLQuantizationType]:
        return quants.quantize(rng.normal(0, 0.1, (rows, columns)).astype(np.float32), kind), kind

    def plain(*shape: int) -> tuple[npt.NDArray[Any], GGMLQuantizationType]:
        return rng.normal(0, 0.1, shape).astype(np.float32), GGMLQuantizationType.F32

    names = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
    names |= {"ffn_gate": (128, 64), "ffn_up": (128, 64), "ffn_down": (64, 128)}
    tensors = {f"blk.0.{name}.weight": linear(*shape) for name, shape in names.items()}
    tensors |= {"blk.0.attn_norm.weight": plain(64), "blk.0.ffn_norm.weight": plain(64)}
    tensors |= {"token_embd.weight": plain(40, 64), "output_norm.weight": plain(64)}
    return write_gguf(path, tensors)


# By hand

U8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10


def text(value: str | bytes, length: int | None = None) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data) if length is None else length) + data


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def string_pair(key: str, value: str) -> bytes:
    return pair(key, STRING, text(value))


def u32_pair(key: str, value: int) -> bytes:
    return pair(key, U32, struct.pack("<I", value))


def array_pair(key: str, kind: int, count: int, items: bytes = b"") -> bytes:
    return pair(key, ARRAY, struct.pack("<IQ", kind, count) + items)


def tensor_info(
    name: str | bytes, dims: Sequence[int] = (32,), kind: int = 0, offset: int = 0, num_dims: int | None = None
) -> bytes:
    head = text(name) + struct.pack("<I", len(dims) if num_dims is None else num_dims)
    return head + struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", kind, offset)


@dataclass(frozen=True)
class RawGGUF:
    """The parts of a file; the default is a sound one with one tensor of 32 float32 values."""

    magic: bytes = b"GGUF"
    version: int = 3
    pairs: Sequence[bytes] = field(default=(string_pair("general.architecture", "llama"),))
    infos: Sequence[bytes] = field(default=(tensor_info("blk.0.attn_norm.weight"),))
    data: bytes = bytes(128)
    num_tensors: int | None = None
    num_pairs: int | None = None
    alignment: int = 32

    def to_bytes(self) -> bytes:
        counts = (
            len(self.infos) if self.num_tensors is None else self.num_tensors,
            len(self.pairs) if self.num_pairs is None else self.num_pairs,
        )
        head = self.magic + struct.pack("<IQQ", self.version, *counts) + b"".join((*self.pairs, *self.infos))
        return head + bytes(-len(head) % self.alignment) + self.data

    def plus(self, *pairs: bytes, **changes: Any) -> RawGGUF:
        """The same with more metadata."""
        return replace(self, pairs=(*self.pairs, *pairs), **changes)
