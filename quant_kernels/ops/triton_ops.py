"""LayerOps in Triton: one launch each, on a CUDA device, or in Triton's interpreter where there is none.

Invariant: nothing here waits for the device or looks at a tensor's contents, so a step can be captured in a CUDA graph
and replayed on other inputs written to the same places.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from quant_kernels.attention.kv_format import LayerCache
from quant_kernels.attention.paged import Rule, Scratch, Work, paged_attention
from quant_kernels.attention.store import HeadNorms, Placement, rope_store
from quant_kernels.elementwise.rms_norm import add_rms_norm
from quant_kernels.elementwise.silu_mul import silu_mul
from quant_kernels.ops.base import Heads, StepInputs
from quant_kernels.tuning.attention import AttentionTile


@dataclass(frozen=True, slots=True)
class TritonInputs(StepInputs):
    """A step on the device.

    Attributes:
        placement: positions, slots, and rope's tables.
        blocks: int32, block ids of all sequences.
        work: attention's items, by window.
        tile: that the items were cut for.
        scratch: room for partial results of attention.
    """

    placement: Placement
    blocks: torch.Tensor
    work: Mapping[int | None, Work]
    tile: AttentionTile
    scratch: Scratch


@dataclass(frozen=True, slots=True)
class TritonOps:
    """See `LayerOps`. `twin` runs plain Triton instead of assembly."""

    twin: bool = False

    def add_rms_norm(
        self,
        sums: torch.Tensor | None,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        places: torch.Tensor | None,
    ) -> torch.Tensor:
        sums = residual.new_empty(0, *residual.shape) if sums is None else sums
        return add_rms_norm(sums, residual, weight, eps, places)

    def silu_mul(self, sums: torch.Tensor, dtype: torch.dtype, places: torch.Tensor | None) -> torch.Tensor:
        return silu_mul(sums, dtype, places)

    def store(
        self, sums: torch.Tensor, dtype: torch.dtype, heads: Heads, cache: LayerCache, inputs: StepInputs
    ) -> torch.Tensor:
        assert isinstance(inputs, TritonInputs), "inputs of another device"
        norms = None if heads.norms is None else HeadNorms(heads.norms, heads.norm_eps)
        return rope_store(sums, heads.num_heads, cache, inputs.placement, dtype, norms)

    def attend(
        self, query: torch.Tensor, heads: Heads, cache: LayerCache, inputs: StepInputs, places: torch.Tensor | None
    ) -> torch.Tensor:
        assert isinstance(inputs, TritonInputs), "inputs of another device"
        rule = Rule(heads.scale, heads.window)
        work = inputs.work[heads.window]
        return paged_attention(
            query, cache, inputs.blocks, work, inputs.scratch, rule, inputs.tile, places, twin=self.twin
        )
