"""Which weights an architecture has: exact names and sizes, as data and without torch.

Invariant: `slots` names each tensor once, and the decoder is built of these and no others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qengine.config import ModelConfig

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


def all_merged_linears(config: ModelConfig, *, tied: bool, layers: range | None = None) -> Iterator[MergedShape]:
    """Every linear as it runs, in order of execution: what `Decoder.linears` yields once it is built.

    Args:
        layers: of one pipeline stage; None for all. The head is there either way.
    """
    for layer in range(config.num_layers) if layers is None else layers:
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


def slots(config: ModelConfig, *, tied: bool, layers: range | None = None) -> Iterator[LinearShape | TensorShape]:
    """Everything the model needs, each name once, in the order in which `decoder.build` asks for it.

    Args:
        layers: of one pipeline stage; None for the whole model.
    """
    layers = range(config.num_layers) if layers is None else layers
    is_last = layers.stop == config.num_layers
    embedding = TensorShape(EMBEDDING + ".weight", (config.vocab_size, config.hidden_size))
    if layers.start == 0:
        yield embedding
    for layer in layers:
        qkv, o, gate_up, down = merged_linears(config, layer)
        # As most files have them, so that a disk reads on.
        for merged in (down, gate_up, qkv, o):
            yield from merged.parts
        input_norm, post_norm, *head_norms = layer_norms(config, layer)
        yield from (*head_norms, input_norm, post_norm)
    if not is_last:
        return
    yield TensorShape(FINAL_NORM, (config.hidden_size,))
    if not tied:
        yield head_linear(config, tied=False)
    elif layers.start > 0:
        yield embedding
