"""Self-attention of one decoder layer over the paged KV cache.

qkv projection -> norm of q and k, rope, and keys and values into the cache -> attend -> output projection.
On several ranks each has some of the heads, and the output projection's results are added up.
Invariant: keys and values of this step are in the cache before anything reads it, so prompt chunks, single tokens and
shared prefixes are one code path. It does not own the cache: the runner passes this layer's part in.
"""

from __future__ import annotations

import torch

from qengine.layers.linear import Linear
from qengine.parallel.group import TPGroup
from quant_kernels.attention.kv_format import LayerCache
from quant_kernels.ops.base import Heads, LayerOps, StepInputs


class Attention:
    """x [rows, hidden] to partial sums [S, rows, hidden]. `heads` are this rank's."""

    def __init__(self, qkv: Linear, output: Linear, heads: Heads, ops: LayerOps, group: TPGroup | None = None) -> None:
        self.qkv = qkv
        self.output = output
        self.heads = heads
        self.ops = ops
        self.group = group or TPGroup.single()

    def __call__(self, x: torch.Tensor, cache: LayerCache, inputs: StepInputs) -> torch.Tensor:
        """x: columns where `qkv` wants them."""
        query = self.ops.store(self.qkv.partial_sums(x), x.dtype, self.heads, cache, inputs)
        out = self.ops.attend(query, self.heads, cache, inputs, self.output.places)
        return self.group.add_up(self.output.partial_sums(out), x.dtype)
