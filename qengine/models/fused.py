"""Whether a decoder's layers can run as one call of the CPU's own kernels, and the stack that does it.

A stack is the layers' weights seen another way: it holds no copies of them. Where it cannot be (a layer split over
ranks, a linear that does not fuse or is not quantized), layers run one operation after the other.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from qengine.layers.linear import Linear
from qengine.layers.norm import RMSNorm
from qengine.layers.rope import RotaryEmbedding
from qengine.models.decoder_layer import DecoderLayer
from quant_kernels.linear.cpu_int8 import CpuInt8Linear
from quant_kernels.linear.dispatch import Target
from quant_kernels.stack import LayerStack, StackLayer, can_stack
from quant_kernels.stack_check import is_right

logger = logging.getLogger(__name__)


def try_stack(
    target: Target, layers: Sequence[DecoderLayer], norm: RMSNorm | None, rope: RotaryEmbedding
) -> LayerStack | None:
    """The stack of all layers of a model that is on one rank; None where it cannot be made."""
    if target.native is None or norm is None or not layers:
        return None
    stacked = [_stack_layer(layer) for layer in layers]
    complete = [layer for layer in stacked if layer is not None]
    if len(complete) < len(stacked):
        logger.info("layers run one operation at a time: some linears have no int8 kernel or do not fuse")
        return None
    first = complete[0]
    possible, reason = can_stack(len(norm.weight), first.gate_up.out_features // 2, first.heads)
    if not possible:
        logger.info("layers run one operation at a time: %s", reason)
        return None
    if not is_right(target.native):
        logger.warning(
            "the %s kernels of whole layers give wrong results here; layers run one operation at a time",
            target.native.level.text,
        )
        return None
    return LayerStack(target.native, complete, norm.weight, norm.eps, rope.cos, rope.sin)


def _stack_layer(layer: DecoderLayer) -> StackLayer | None:
    linears = (layer.attention.qkv, layer.attention.output, layer.mlp.gate_up, layer.mlp.down)
    parts = [part for linear in linears if (part := _only_part(linear)) is not None]
    if len(parts) < len(linears):
        return None
    qkv, out, gate_up, down = parts
    norms = layer.input_norm.weight, layer.post_norm.weight
    return StackLayer(qkv, out, gate_up, down, *norms, layer.attention.heads)


def _only_part(linear: Linear) -> CpuInt8Linear | None:
    part = linear.parts[0]
    return part if len(linear.parts) == 1 and isinstance(part, CpuInt8Linear) else None
