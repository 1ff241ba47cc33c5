"""Paged caches filled at random, and steps over them, for tests of attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from quant_kernels.attention.kv_format import KVFormat, LayerCache, write
from quant_kernels.attention.paged import Work
from quant_kernels.attention.work import Sharing, Spans, plan_items
from quant_kernels.tuning.attention import AttentionTile
from tests.quant_kernels.records import make_cache


@dataclass(frozen=True)
class Case:
    """Sequences of a step: (tokens before, tokens of the step) each, with their blocks and rows."""

    entries: Sequence[tuple[int, int]]
    tables: list[list[int]]
    cache: LayerCache
    query: torch.Tensor

    @property
    def rows(self) -> list[int]:
        counts = [count for _, count in self.entries]
        return [sum(counts[:i]) for i in range(len(counts))]

    @property
    def blocks(self) -> torch.Tensor:
        return torch.tensor([b for table in self.tables for b in table], dtype=torch.int32, device=self.query.device)

    def work(self, tile: AttentionTile, window: int | None, sharing: Sharing, programs: int) -> Work:
        """Items of the step for `programs` programs."""
        lengths = [len(table) for table in self.tables]
        offsets = [sum(lengths[:i]) for i in range(len(lengths))]
        starts, counts = zip(*self.entries, strict=True)
        spans = Spans(*(np.array(a, dtype=np.int64) for a in (self.rows, starts, counts, offsets)))
        group = self.query.shape[1] // self.cache.num_kv_heads
        items = plan_items(spans, tile, group, window, sharing)
        device = self.query.device
        number = torch.tensor([len(items)], dtype=torch.int32, device=device)
        return Work(number, torch.from_numpy(items).to(device, torch.int32), programs)


def make_case(
    kv_format: KVFormat,
    entries: Sequence[tuple[int, int]],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    spread: float = 1.0,
    seed: int = 0,
) -> Case:
    """A cache that holds everything up to the end of the step, in scattered blocks, among blocks of garbage.

    `spread` is the standard deviation of values.
    """
    rng = torch.Generator(device=device).manual_seed(seed)
    needed = [-(-(start + count) // block_size) for start, count in entries]
    order = torch.randperm(sum(needed) + 3, generator=rng, device=device).tolist()
    cache = make_cache(kv_format, len(order), block_size, kv_heads, head_dim, device)
    _fill_with_garbage(cache)
    tables = []
    for (start, count), number in zip(entries, needed, strict=True):
        table, order = order[:number], order[number:]
        positions = torch.arange(start + count, device=device)
        slots = torch.tensor(table, device=device)[positions // block_size] * block_size + positions % block_size
        shape = (start + count, kv_heads, head_dim)
        keys, values = (torch.randn(shape, generator=rng, device=device) for _ in range(2))
        write(cache, slots, keys.to(dtype), (values * spread).to(dtype))
        tables.append(table)
    rows = sum(count for _, count in entries)
    query = torch.randn(rows, heads, head_dim, generator=rng, device=device).to(dtype)
    return Case(entries, tables, cache, query)


def _fill_with_garbage(cache: LayerCache) -> None:
    """What a reused block may hold: NaN, or any bytes (e5m2's but NaN and infinity) with a scale that is none."""
    for part in cache.parts():
        part.fill_(torch.nan if part.is_floating_point() else 0x7B7B if cache.scales is None else 0x7F7F)
