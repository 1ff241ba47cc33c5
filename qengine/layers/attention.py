"""Self-attention of one decoder layer over the paged KV cache.

qkv projection -> optional per-head norm of q and k -> rope -> write k, v into the cache -> attend -> output projection.
Invariant: keys and values of this step are in the cache before anything reads it, so prompt chunks, single tokens and
shared prefixes are one code path. It does not own the cache: the runner passes this layer's tensors in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qengine.layers.linear import Linear
from qengine.layers.norm import RMSNorm
from qengine.layers.rope import rotate
from qengine.parallel.group import TPGroup
from quant_kernels.attention.paged import Segment, paged_attention


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's keys and values: [num_blocks, block_size, num_kv_heads, head_dim] each."""

    keys: torch.Tensor
    values: torch.Tensor

    def write(self, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store keys and values [rows, num_kv_heads, head_dim] at int64 slots [rows]."""
        self.keys.view(-1, *keys.shape[1:]).index_copy_(0, slots, keys)
        self.values.view(-1, *values.shape[1:]).index_copy_(0, slots, values)


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What every layer of a step shares.

    `slots` int64 [rows] is where each row's key and value go; `cos` and `sin` are the rows' rope angles.
    """

    slots: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    segments: Sequence[Segment]


class Attention:
    """x [rows, hidden] to [rows, hidden]."""

    def __init__(
        self,
        qkv: Linear,
        output: Linear,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        window: int | None = None,
        query_norm: RMSNorm | None = None,
        key_norm: RMSNorm | None = None,
        group: TPGroup | None = None,
    ) -> None:
        self.qkv = qkv
        self.output = output
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.window = window
        self.query_norm = query_norm
        self.key_norm = key_norm
        self.group = group or TPGroup.single()

    def __call__(self, x: torch.Tensor, cache: LayerCache, inputs: StepInputs) -> torch.Tensor:
        heads = self.qkv(x).view(x.shape[0], -1, self.head_dim)
        num_rotated = self.num_heads + self.num_kv_heads
        rotated = rotate(self._normalized(heads[:, :num_rotated]), inputs.cos, inputs.sin)
        query, keys = rotated[:, : self.num_heads], rotated[:, self.num_heads :]
        cache.write(inputs.slots, keys.to(cache.keys.dtype), heads[:, num_rotated:].to(cache.values.dtype))
        scale = self.head_dim**-0.5
        query = query.to(cache.keys.dtype)
        out = paged_attention(query, cache.keys, cache.values, inputs.segments, scale, self.window)
        return self.group.all_reduce(self.output(out.to(x.dtype)))

    def _normalized(self, heads: torch.Tensor) -> torch.Tensor:
        if self.query_norm is None or self.key_norm is None:
            return heads
        query, keys = heads[:, : self.num_heads], heads[:, self.num_heads :]
        return torch.cat([self.query_norm(query), self.key_norm(keys)], dim=1)
