"""The one decoder: pre-norm attention and gated MLP, shared by every architecture of the registry.

`build` puts it together of the weights that `models.shapes` names, from whatever reads them. Invariant: `forward` is a
pure function of its arguments and the KV cache; rows are tokens, in any mix of sequences. It does not read files,
allocate the cache or sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from qengine.config import ModelConfig
from qengine.layers.attention import Attention
from qengine.layers.embedding import Embedding
from qengine.layers.linear import Linear, Weight, fuse
from qengine.layers.mlp import GatedMLP
from qengine.layers.norm import RMSNorm
from qengine.layers.rope import RotaryEmbedding
from qengine.models.shapes import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    LinearShape,
    MergedShape,
    TensorShape,
    head_linear,
    layer_norms,
    merged_linears,
)
from quant_kernels.attention.kv_format import LayerCache
from quant_kernels.linear.dispatch import Target
from quant_kernels.ops.base import Heads, StepInputs
from quant_kernels.packed_weight import DenseWeight
from quant_kernels.packing import select_outputs, take_input_order


class DecoderLayer:
    """One transformer block; changes the residual stream in place."""

    def __init__(self, input_norm: RMSNorm, attention: Attention, post_norm: RMSNorm, mlp: GatedMLP) -> None:
        self.input_norm = input_norm
        self.attention = attention
        self.post_norm = post_norm
        self.mlp = mlp

    def __call__(
        self, sums: torch.Tensor | None, residual: torch.Tensor, cache: LayerCache, inputs: StepInputs
    ) -> torch.Tensor:
        """Partial sums [S, rows, hidden] of the previous layer, not yet in the residual, to those of this one."""
        return self.feed(self.attend(sums, residual, cache, inputs), residual)

    def attend(
        self, sums: torch.Tensor | None, residual: torch.Tensor, cache: LayerCache, inputs: StepInputs
    ) -> torch.Tensor:
        """The first half: partial sums of the previous layer to those of attention."""
        return self.attention(self.input_norm.add(sums, residual, self.attention.qkv.places), cache, inputs)

    def feed(self, attended: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The second half: partial sums of attention to those of the MLP."""
        return self.mlp(self.post_norm.add(attended, residual, self.mlp.gate_up.places))


class Decoder:
    """A causal language model: token ids and positions in, hidden states and logits out."""

    def __init__(
        self,
        config: ModelConfig,
        embedding: Embedding,
        layers: Sequence[DecoderLayer],
        norm: RMSNorm,
        head: Linear,
        rope: RotaryEmbedding,
    ) -> None:
        self.config = config
        self.embedding = embedding
        self.layers = layers
        self.norm = norm
        self.head = head
        self.rope = rope

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states."""
        return self.embedding.table.dtype

    def forward(self, token_ids: torch.Tensor, cache: Sequence[LayerCache], inputs: StepInputs) -> torch.Tensor:
        """Token ids [rows] to normalized hidden states [rows, hidden]; writes the cache."""
        residual = self.embedding(token_ids)
        sums = None
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            sums = layer(sums, residual, layer_cache, inputs)
        return self.norm.add(sums, residual)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [rows, hidden] to float32 logits [rows, vocab]."""
        return self.head(hidden).float()

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights; a table that embedding and head share counts once."""
        norms = [norm.weight for layer in self.layers for norm in (layer.input_norm, layer.post_norm)]
        norms += [heads for layer in self.layers if (heads := layer.attention.heads.norms) is not None]
        plain = sum(t.numel() * t.element_size() for t in (*norms, self.norm.weight))
        table = 0 if self._is_tied else self.embedding.num_bytes
        return plain + table + sum(linear.num_bytes for linear in self.linears())

    @property
    def _is_tied(self) -> bool:
        """Whether the head multiplies by the embedding's own table."""
        return any(getattr(part, "weight", None) is self.embedding.table for part in self.head.parts)

    def linears(self) -> Iterator[Linear]:
        """Every linear, in order of execution."""
        for layer in self.layers:
            yield from (layer.attention.qkv, layer.attention.output, layer.mlp.gate_up, layer.mlp.down)
        yield self.head


@dataclass(frozen=True, slots=True)
class Materials:
    """How `build` gets what it needs: readers by shape, and where the results live."""

    read_tensor: Callable[[TensorShape], torch.Tensor]
    read_linear: Callable[[LinearShape], Weight]
    target: Target


def build(config: ModelConfig, materials: Materials, *, tied: bool, max_position: int) -> Decoder:
    """Assemble the decoder, reading one layer after the other; qkv and gate_up are fused where they can be.

    Args:
        tied: the head uses the embedding's weights.
        max_position: positions that rope tables are made for.
    """
    dtype, device = materials.target.dtype, materials.target.device
    table = materials.read_tensor(TensorShape(EMBEDDING + ".weight", (config.vocab_size, config.hidden_size)))
    embedding = Embedding(table.to(device=device, dtype=dtype))
    layers = [_build_layer(config, materials, layer) for layer in range(config.num_layers)]
    norm = _norm(config, materials, TensorShape(FINAL_NORM, (config.hidden_size,)))
    head_weight = materials.read_linear(head_linear(config, tied=tied))
    if tied and isinstance(head_weight, DenseWeight):
        head_weight = DenseWeight(embedding.table)  # One table in memory, not two.
    head = Linear(HEAD, [head_weight], materials.target)
    rope = RotaryEmbedding(config.rope, config.head_dim, max_position, device)
    return Decoder(config, embedding, layers, norm, head, rope)


def _norm(config: ModelConfig, materials: Materials, shape: TensorShape) -> RMSNorm:
    return RMSNorm(_tensor(materials, shape), config.rms_norm_eps, materials.target.ops)


def _tensor(materials: Materials, shape: TensorShape) -> torch.Tensor:
    return materials.read_tensor(shape).to(device=materials.target.device, dtype=materials.target.dtype)


def _build_layer(config: ModelConfig, materials: Materials, layer: int) -> DecoderLayer:
    """One layer's worth: a merged linear is on its device, and its parts are gone, before the next is read."""
    input_norm, post_norm, *head_norms = layer_norms(config, layer)
    qkv, o, gate_up, down = merged_linears(config, layer)
    qkv_linear, o_linear = _linear(materials, qkv), _linear(materials, o)
    gate_up_linear, down_linear = _folded_mlp(materials, gate_up, down)
    ops = materials.target.ops
    heads = Heads(
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        window=config.windows[layer],
        norms=torch.stack([_tensor(materials, shape) for shape in head_norms]) if head_norms else None,
        norm_eps=config.rms_norm_eps,
    )
    attention = Attention(qkv_linear, o_linear, heads, ops)
    mlp = GatedMLP(gate_up_linear, down_linear, ops)
    return DecoderLayer(_norm(config, materials, input_norm), attention, _norm(config, materials, post_norm), mlp)


def _linear(materials: Materials, shape: MergedShape) -> Linear:
    return Linear(shape.name, _read(materials, shape, None), materials.target)


def _read(materials: Materials, shape: MergedShape, order: torch.Tensor | None) -> Sequence[Weight]:
    """The parts, fused where they can be: as read they are gone before the whole is prepared, which takes as much."""
    parts = [materials.read_linear(part) for part in shape.parts]
    if order is not None:
        parts = [select_outputs(part, order) for part in parts]
    return fuse(parts)[0]


def _folded_mlp(materials: Materials, gate_up: MergedShape, down: MergedShape) -> tuple[Linear, Linear]:
    """gate_up and down, whose activation order moves into the outputs of gate and up: so down is read first."""
    [weight] = _read(materials, down, None)
    folded, order = take_input_order(weight)
    del weight
    down_linear = Linear(down.name, [folded], materials.target, order_is_folded=order is not None)
    del folded
    return Linear(gate_up.name, _read(materials, gate_up, order), materials.target), down_linear
