"""One rank's part of the linears of a layer: each is read whole, cut, and let go of before the next one is read.

The order of work is convert, fold, cut; then the parts are fused and prepared. Invariant: the parts of all ranks add up
to the layer, exactly; a rank that has everything gets the weights as they were read. Only the first rank keeps the
biases of o and down, whose results are added up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from qengine.config import ModelConfig
from qengine.layers.linear import Weight
from qengine.models.shapes import LinearShape, attention_linears, mlp_linears
from qengine.parallel.split import RankShape
from quant_kernels.packing import select_outputs, without_input_order
from quant_kernels.sharding import slice_inputs, slice_outputs

ReadLinear = Callable[[LinearShape], Weight]


@dataclass(frozen=True, slots=True)
class LayerParts:
    """`order_is_folded`: down's activation order has moved into the outputs of gate and up."""

    qkv: list[Weight]
    o: Weight
    gate_up: list[Weight]
    down: Weight
    order_is_folded: bool


def read_layer(config: ModelConfig, layer: int, shape: RankShape, read: ReadLinear) -> LayerParts:
    """What the rank of `shape` needs of a layer.

    Args:
        config: of the whole model.
        read: a linear of the checkpoint.
    """
    q, k, v, o = attention_linears(config, layer)
    gate, up, down = mlp_linears(config, layer)
    queries, keys = (_columns(heads, config.head_dim) for heads in (shape.query_heads, shape.kv_heads))
    qkv = [slice_outputs(read(part), outputs) for part, outputs in ((q, queries), (k, keys), (v, keys))]
    o_part = slice_inputs(read(o), queries, with_bias=shape.rank == 0)
    # Down comes first: gate and up are cut in the order in which its rows are stored.
    down_part, order = _down_part(read(down), shape)
    gate_up = [_inner_outputs(read(part), shape.intermediate, order) for part in (gate, up)]
    return LayerParts(qkv, o_part, gate_up, down_part, order is not None)


def _columns(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)


def _down_part(down: Weight, shape: RankShape) -> tuple[Weight, torch.Tensor | None]:
    stored, order = without_input_order(down)
    return slice_inputs(stored, shape.intermediate, with_bias=shape.rank == 0), order


def _inner_outputs(weight: Weight, inner: range, order: torch.Tensor | None) -> Weight:
    """The outputs that become inputs of this rank's down: a range of them as they are, or as down stores its rows."""
    return slice_outputs(weight, inner) if order is None else select_outputs(weight, order[inner.start : inner.stop])
