"""The one decoder: pre-norm attention and gated MLP, shared by every architecture of the registry.

`slots` says which tensors a ModelConfig needs, by exact name; `build` puts the decoder together from whatever reads
them. Invariant: `forward` is a pure function of its arguments and the KV cache; rows are tokens, in any mix of
sequences. It does not read files, allocate the cache or sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from qengine.config import ModelConfig
from qengine.layers.attention import Attention
from qengine.layers.embedding import Embedding
from qengine.layers.linear import Linear, Weight
from qengine.layers.mlp import GatedMLP
from qengine.layers.norm import RMSNorm
from qengine.layers.rope import RotaryEmbedding
from quant_kernels.attention.kv_format import LayerCache
from quant_kernels.linear.dispatch import Target
from quant_kernels.ops.base import Heads, StepInputs
from quant_kernels.packed_weight import DenseWeight
from quant_kernels.packing import fold_input_order

EMBEDDING = "model.embed_tokens"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head"


@dataclass(frozen=True, slots=True)
class LinearShape:
    """One linear of the architecture, under its checkpoint name."""

    name: str
    in_features: int
    out_features: int
    has_bias: bool = False


@dataclass(frozen=True, slots=True)
class TensorShape:
    """One plain tensor of the architecture, under its checkpoint name."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MergedShape:
    """Linears that read the same input, side by side: one matmul where their formats allow it.

    Attributes:
        name: of the whole, e.g. "model.layers.0.self_attn.qkv_proj".
        parts: as the checkpoint has them.
        folds_order: an activation order moves into the outputs of the linears before it.
    """

    name: str
    parts: tuple[LinearShape, ...]
    folds_order: bool = False


def attention_linears(config: ModelConfig, layer: int) -> list[LinearShape]:
    """q, k, v and o of one layer."""
    prefix = f"model.layers.{layer}.self_attn."
    hidden, q_size = config.hidden_size, config.num_heads * config.head_dim
    kv_size = config.num_kv_heads * config.head_dim
    return [
        LinearShape(prefix + "q_proj", hidden, q_size, config.qkv_bias),
        LinearShape(prefix + "k_proj", hidden, kv_size, config.qkv_bias),
        LinearShape(prefix + "v_proj", hidden, kv_size, config.qkv_bias),
        LinearShape(prefix + "o_proj", q_size, hidden, config.o_bias),
    ]


def mlp_linears(config: ModelConfig, layer: int) -> list[LinearShape]:
    """gate, up and down of one layer."""
    prefix = f"model.layers.{layer}.mlp."
    hidden, inner = config.hidden_size, config.intermediate_size
    return [
        LinearShape(prefix + "gate_proj", hidden, inner, config.mlp_bias),
        LinearShape(prefix + "up_proj", hidden, inner, config.mlp_bias),
        LinearShape(prefix + "down_proj", inner, hidden, config.mlp_bias),
    ]


def merged_linears(config: ModelConfig, layer: int) -> tuple[MergedShape, ...]:
    """qkv, o, gate_up and down of one layer: what its linears run as."""
    prefix = f"model.layers.{layer}."
    q, k, v, o = attention_linears(config, layer)
    gate, up, down = mlp_linears(config, layer)
    return (
        MergedShape(prefix + "self_attn.qkv_proj", (q, k, v)),
        MergedShape(prefix + "self_attn.o_proj", (o,)),
        MergedShape(prefix + "mlp.gate_up_proj", (gate, up)),
        MergedShape(prefix + "mlp.down_proj", (down,), folds_order=True),
    )


def all_merged_linears(config: ModelConfig, *, tied: bool) -> Iterator[MergedShape]:
    """Every linear as it runs, in order of execution: what `Decoder.linears` yields once it is built."""
    for layer in range(config.num_layers):
        yield from merged_linears(config, layer)
    yield MergedShape(HEAD, (head_linear(config, tied=tied),))


def layer_norms(config: ModelConfig, layer: int) -> list[TensorShape]:
    """The norm weights of one layer: input, post-attention, and q, k where the architecture has them."""
    prefix = f"model.layers.{layer}."
    norms = [
        TensorShape(prefix + "input_layernorm.weight", (config.hidden_size,)),
        TensorShape(prefix + "post_attention_layernorm.weight", (config.hidden_size,)),
    ]
    if config.qk_norm:
        norms.append(TensorShape(prefix + "self_attn.q_norm.weight", (config.head_dim,)))
        norms.append(TensorShape(prefix + "self_attn.k_norm.weight", (config.head_dim,)))
    return norms


def head_linear(config: ModelConfig, *, tied: bool) -> LinearShape:
    """The output projection; the embedding's own weights when tied."""
    return LinearShape(EMBEDDING if tied else HEAD, config.hidden_size, config.vocab_size)


def slots(config: ModelConfig, *, tied: bool) -> Iterator[LinearShape | TensorShape]:
    """Everything the model needs, each name once."""
    yield TensorShape(EMBEDDING + ".weight", (config.vocab_size, config.hidden_size))
    for layer in range(config.num_layers):
        yield from layer_norms(config, layer)
        yield from attention_linears(config, layer)
        yield from mlp_linears(config, layer)
    yield TensorShape(FINAL_NORM, (config.hidden_size,))
    if not tied:
        yield head_linear(config, tied=False)


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
        normed = self.input_norm.add(sums, residual, self.attention.qkv.places)
        attended = self.attention(normed, cache, inputs)
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
    input_norm, post_norm, *head_norms = layer_norms(config, layer)
    shapes = merged_linears(config, layer)
    qkv, o, gate_up, [down] = ([materials.read_linear(part) for part in shape.parts] for shape in shapes)
    folded, gate_up = fold_input_order(down, gate_up)

    def linear(shape: MergedShape, parts: Sequence[Weight]) -> Linear:
        return Linear(shape.name, parts, materials.target, order_is_folded=shape.folds_order and folded is not down)

    ops = materials.target.ops
    heads = Heads(
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        window=config.windows[layer],
        norms=torch.stack([_tensor(materials, shape) for shape in head_norms]) if head_norms else None,
        norm_eps=config.rms_norm_eps,
    )
    attention = Attention(linear(shapes[0], qkv), linear(shapes[1], o), heads, ops)
    mlp = GatedMLP(linear(shapes[2], gate_up), linear(shapes[3], [folded]), ops)
    return DecoderLayer(_norm(config, materials, input_norm), attention, _norm(config, materials, post_norm), mlp)
