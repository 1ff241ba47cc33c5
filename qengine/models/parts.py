"""One rank's part of the linears of a layer: each is read whole, cut, and let go of before the next one is read.

The order of work is convert, fold, cut; then the result is fused and prepared, and the next is asked for.
Invariant: the parts of all ranks add up to the layer, exactly; a rank that has everything gets the weights as they were
read. Only the first rank keeps the biases of o and down, whose results are added up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from qengine.config import ModelConfig
from qengine.layers.linear import Weight
from qengine.models.shapes import LinearShape, MergedShape
from qengine.parallel.split import RankShape
from quant_kernels.packing import select_outputs, take_input_order
from quant_kernels.sharding import slice_inputs, slice_outputs

ReadLinear = Callable[[LinearShape], Weight]


@dataclass(frozen=True, slots=True)
class PartReader:
    """What the rank of `shape` needs of merged linears, part by part.

    Attributes:
        config: of the whole model.
        read: a linear of the checkpoint.
    """

    config: ModelConfig
    shape: RankShape
    read: ReadLinear

    def qkv(self, merged: MergedShape) -> Sequence[Weight]:
        """The columns of this rank's heads."""
        queries, keys = self._columns(self.shape.query_heads), self._columns(self.shape.kv_heads)
        cuts = zip(merged.parts, (queries, keys, keys), strict=True)
        return [slice_outputs(self.read(part), outputs) for part, outputs in cuts]

    def o(self, merged: MergedShape) -> Sequence[Weight]:
        """The rows of this rank's query heads."""
        [part] = merged.parts
        return [slice_inputs(self.read(part), self._columns(self.shape.query_heads), with_bias=self.shape.rank == 0)]

    def down(self, merged: MergedShape) -> tuple[Sequence[Weight], torch.Tensor | None]:
        """The rows of this rank's intermediate columns, as they are stored, and those columns in that order.

        Returns:
            The weight, and which outputs of gate and up its rows take, int64; None for a range of them.
        """
        [part] = merged.parts
        inner = self.shape.intermediate
        stored, order = take_input_order(self.read(part))
        order = None if order is None else order[inner.start : inner.stop]
        return [slice_inputs(stored, inner, with_bias=self.shape.rank == 0)], order

    def gate_up(self, merged: MergedShape, order: torch.Tensor | None) -> Sequence[Weight]:
        """The outputs that `down` takes, in its order."""
        return [self._inner(self.read(part), order) for part in merged.parts]

    def _inner(self, weight: Weight, order: torch.Tensor | None) -> Weight:
        return slice_outputs(weight, self.shape.intermediate) if order is None else select_outputs(weight, order)

    def _columns(self, heads: range) -> range:
        head_dim = self.config.head_dim
        return range(heads.start * head_dim, heads.stop * head_dim)
