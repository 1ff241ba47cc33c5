"""The attention and store kernels as variants: formats of the cache, head sizes, tiles, architectures.

Every tile that `tuning.attention` can select is here for every head size and format. What changes a kernel around its
loop (windows, caps, sinks, an order of columns, blocks of 32, queries of another type) is compiled for the commonest
sizes, one at a time where they are rarely met together. Nothing is compiled here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from quant_kernels.attention import store
from quant_kernels.attention.kv_format import FP8_E4M3, FP8_E5M2, INT8, KVFormat, plain
from quant_kernels.attention.paged import attention_constants, paged_attention_kernel
from quant_kernels.launching import launch_options
from quant_kernels.scheme import ACTIVATION_DTYPES
from quant_kernels.tuning.attention import (
    BLOCK_SIZES,
    HEAD_DIMS,
    MAX_ORDERED_ROWS,
    AttentionTile,
    attention_tiles,
)
from quant_kernels.tuning.card import SHARED_PER_BLOCK

#: kernel, types, constants, options: what a compilation needs.
Arguments = tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]
_PACKED = (INT8, FP8_E4M3, FP8_E5M2)
_POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16"}
#: Head sizes that also get the kernel with everything on.
_ODD_DIMS = (128, 256)
_COMMON_DIM, _COMMON_BLOCK = 128, 16
#: Query heads of a KV head; the kernel's code hardly depends on it.
_GROUP = 4
#: Heads of q and of a KV cache whose stores are compiled: all of a program's heads are one head, or eight.
_STORED_HEADS = ((32, 8), (7, 1))
_MOST_SPLITS = 16


@dataclass(frozen=True, slots=True)
class AttentionVariant:
    """The attention kernel for one cache, tile and architecture.

    Attributes:
        dtype: of queries.
        odd: with a window, a softcap, sinks, and columns in another order.
    """

    kv_format: KVFormat
    head_dim: int
    block_size: int
    tile: AttentionTile
    arch: int
    dtype: torch.dtype
    odd: bool = False

    kernel = "attention"
    scheme = None

    @property
    def config(self) -> str:
        """Everything but the architecture, in words."""
        queries = str(self.dtype).removeprefix("torch.")
        parts = [queries, f"kv {self.kv_format.name}", f"d{self.head_dim}", f"b{self.block_size}", self.tile.name]
        return " ".join([*parts, *(["odd"] if self.odd else [])])

    @property
    def weights_per_thread(self) -> float:
        """Numbers of keys and values per thread and turn of the loop."""
        return 2 * self.tile.keys * self.head_dim / (32 * self.tile.num_warps)

    def arguments(self) -> Arguments:
        """For `cross_compile`."""
        cache = _POINTERS[self.kv_format.dtype] if self.kv_format.dtype is not None else "*i16"
        types = {
            **dict.fromkeys(("query_ptr", "out_ptr", "sinks_ptr"), _POINTERS[self.dtype]),
            **dict.fromkeys(("key_ptr", "value_ptr"), cache),
            **dict.fromkeys(("sums_ptr", "stats_ptr"), "*fp32"),
            **dict.fromkeys(("scales_ptr", "num_items_ptr", "items_ptr", "blocks_ptr"), "*i32"),
            **dict.fromkeys(("places_ptr", "counters_ptr"), "*i32"),
            **dict.fromkeys(("num_places", "stride_query", "stride_out", "window", "num_kv_heads"), "i32"),
            **dict.fromkeys(("scale", "softcap"), "fp32"),
        }
        constants = {
            **attention_constants(self.kv_format, self.tile, self.head_dim, self.block_size, self.dtype),
            **dict.fromkeys(("WINDOW", "SOFTCAP", "SINKS"), self.odd),
            "PERMUTED": self.odd and self.tile.block_m <= MAX_ORDERED_ROWS,
            "GROUP": _GROUP,
        }
        return paged_attention_kernel, types, constants, launch_options(self.tile.num_warps, self.tile.num_stages)


@dataclass(frozen=True, slots=True)
class StoreVariant:
    """The kernel between qkv and attention, for one cache and one number of partial sums; q and k are normed."""

    kv_format: KVFormat
    head_dim: int
    heads: tuple[int, int]
    splits: int
    arch: int
    dtype: torch.dtype

    kernel = "rope_store"
    scheme = None
    tile = None
    weights_per_thread = 0.0

    @property
    def config(self) -> str:
        """Everything but the architecture, in words."""
        queries = str(self.dtype).removeprefix("torch.")
        together = self._constants()["HEADS"]
        return f"{queries} kv {self.kv_format.name} d{self.head_dim}, {together} heads, {self.splits} sums"

    def arguments(self) -> Arguments:
        """For `cross_compile`."""
        queries = _POINTERS[self.dtype]
        is_packed = self.kv_format.dtype is None
        types = {
            "x_ptr": queries if self.splits == 1 else "*fp32",
            **dict.fromkeys(("norms_ptr", "query_ptr"), queries),
            **dict.fromkeys(("positions_ptr", "slots_ptr"), "*i32"),
            **dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32"),
            "keys_ptr": "*i16" if is_packed else _POINTERS[self.kv_format.dtype or self.dtype],
            "values_ptr": "*u8" if is_packed else _POINTERS[self.kv_format.dtype or self.dtype],
            "scales_ptr": "*i16",
            **dict.fromkeys(("num_rows", "num_heads", "num_kv_heads"), "i32"),
            "eps": "fp32",
        }
        constants = {**self._constants(), "SPLIT_K": self.splits, "NORM": True, "ROUND": False}
        return store.rope_store_kernel, types, constants, store.store_options(constants)

    def _constants(self) -> dict[str, Any]:
        return store.store_constants(self.kv_format, *self.heads, self.head_dim, _COMMON_BLOCK)


def attention_variants() -> Iterator[AttentionVariant | StoreVariant]:
    """Both kernels in the forms that models launch."""
    for arch in SHARED_PER_BLOCK:
        for kv_format, dtype in _caches():
            for head_dim in HEAD_DIMS:
                yield from _of_cache(kv_format, dtype, head_dim, arch)


def _caches() -> Iterator[tuple[KVFormat, torch.dtype]]:
    """Formats with the dtypes of the models that use them."""
    yield from itertools.product((*map(plain, ACTIVATION_DTYPES), *_PACKED), ACTIVATION_DTYPES)


def _of_cache(
    kv_format: KVFormat, dtype: torch.dtype, head_dim: int, arch: int
) -> Iterator[AttentionVariant | StoreVariant]:
    is_common = head_dim == _COMMON_DIM
    is_packed = kv_format.dtype is None
    is_mixed = not is_packed and kv_format.dtype != dtype
    if is_mixed and not is_common:
        return
    for heads, splits in itertools.product(_STORED_HEADS, (1, _MOST_SPLITS)):
        if is_common or (heads, splits) == (_STORED_HEADS[0], 1):
            yield StoreVariant(kv_format, head_dim, heads, splits, arch, dtype)
    if is_packed and dtype == torch.bfloat16 and not is_common:
        return
    for tile in attention_tiles(arch, head_dim, packed=is_packed):
        yield AttentionVariant(kv_format, head_dim, _COMMON_BLOCK, tile, arch, dtype)
        if head_dim in _ODD_DIMS and not is_mixed:
            yield AttentionVariant(kv_format, head_dim, _COMMON_BLOCK, tile, arch, dtype, odd=True)
        if is_common:
            yield AttentionVariant(kv_format, head_dim, BLOCK_SIZES[-1], tile, arch, dtype)
