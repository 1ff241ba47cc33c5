"""The one decoder: pre-norm attention and gated MLP, shared by every architecture of the registry.

`build` puts it together of the weights that `models.shapes` names, from whatever reads them: all of them, or one rank's
part of each layer (`TPGroup`) and one stage's layers. Invariant: `forward` is a pure function of its arguments and the
KV cache; rows are tokens, in any mix of sequences. It does not read files, allocate the cache or sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from qengine.config import ModelConfig
from qengine.layers.attention import Attention
from qengine.layers.embedding import Embedding
from qengine.layers.linear import Linear
from qengine.layers.mlp import GatedMLP
from qengine.layers.norm import RMSNorm
from qengine.layers.rope import RotaryEmbedding
from qengine.models.decoder_layer import DecoderLayer
from qengine.models.fused import try_stack
from qengine.models.parts import PartReader, ReadLinear
from qengine.models.shapes import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    MergedShape,
    TensorShape,
    head_linear,
    layer_norms,
    merged_linears,
)
from qengine.parallel.group import TPGroup
from quant_kernels.attention.kv_format import LayerCache
from quant_kernels.linear.dispatch import Target
from quant_kernels.ops.base import Heads, StepInputs
from quant_kernels.packed_weight import DenseWeight
from quant_kernels.sharding import slice_outputs
from quant_kernels.stack import LayerStack, NativeInputs


class Decoder:
    """A causal language model, or the part of one that a rank runs: token ids and positions in, logits out.

    Attributes:
        config: of what is here: this rank's heads and intermediate columns, this stage's layers. The vocabulary is
            the whole model's.
        embedding: of the first stage; None on others.
        norm, head: of the last stage; None on others.
        stack: all layers as one call, for inputs that were made for it; None where they cannot be.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        layers: Sequence[DecoderLayer],
        rope: RotaryEmbedding,
        group: TPGroup,
        *,
        embedding: Embedding | None,
        norm: RMSNorm | None,
        head: Linear | None,
        stack: LayerStack | None = None,
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.layers = layers
        self.rope = rope
        self.group = group
        self.embedding = embedding
        self.norm = norm
        self.head = head
        self.stack = stack

    def forward(self, x: torch.Tensor, cache: Sequence[LayerCache], inputs: StepInputs) -> torch.Tensor:
        """Run the layers; writes the cache.

        Args:
            x: token ids [rows] for the first stage; for the others what the stage before returned, which is changed.

        Returns:
            [rows, hidden]: normalized hidden states from the last stage, the residual stream from the others.
        """
        residual = x if self.embedding is None else self.embedding(x)
        if isinstance(inputs, NativeInputs):
            assert self.stack is not None, "inputs for a stack that is not there"
            return self.stack.run(residual.float(), cache, inputs)
        sums = None
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            sums = layer(sums, residual, layer_cache, inputs)
        if self.norm is not None:
            return self.norm.add(sums, residual)
        assert sums is not None, "a stage has a layer"
        return residual.add_(sums[0] if len(sums) == 1 else sums.sum(0))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [rows, hidden] of the last stage to float32 logits [rows, vocab], on every rank of it."""
        assert self.head is not None, "only the last stage has the head"
        if self.group.size == 1:
            return self.head.in_float32(hidden)
        return self.group.gather_vocab(self.head(hidden)).float()

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights; a table that embedding and head share counts once."""
        norms = [norm.weight for layer in self.layers for norm in (layer.input_norm, layer.post_norm)]
        norms += [heads for layer in self.layers if (heads := layer.attention.heads.norms) is not None]
        norms += [] if self.norm is None else [self.norm.weight]
        plain = sum(t.numel() * t.element_size() for t in norms)
        table = 0 if self.embedding is None or self._is_tied else self.embedding.num_bytes
        return plain + table + sum(linear.num_bytes for linear in self.linears())

    @property
    def _is_tied(self) -> bool:
        """Whether the head multiplies by the embedding's own table."""
        parts = [] if self.head is None else self.head.parts
        return self.embedding is not None and any(
            getattr(part, "weight", None) is self.embedding.table for part in parts
        )

    def linears(self) -> Iterator[Linear]:
        """Every linear, in order of execution."""
        for layer in self.layers:
            yield from (layer.attention.qkv, layer.attention.output, layer.mlp.gate_up, layer.mlp.down)
        if self.head is not None:
            yield self.head


@dataclass(frozen=True, slots=True)
class Materials:
    """How `build` gets what it needs: readers by shape, and where the results live."""

    read_tensor: Callable[[TensorShape], torch.Tensor]
    read_linear: ReadLinear
    target: Target


def build(
    config: ModelConfig,
    materials: Materials,
    *,
    tied: bool,
    max_position: int,
    group: TPGroup | None = None,
    layers: range | None = None,
) -> Decoder:
    """Assemble the decoder, reading one layer after the other; qkv and gate_up are fused where they can be.

    Args:
        config: of the whole model.
        tied: the head uses the embedding's weights.
        max_position: positions that rope tables are made for.
        group: of the ranks that share every layer; None for this one alone.
        layers: of this pipeline stage; None for all.
    """
    layers = range(config.num_layers) if layers is None else layers
    builder = _Builder(config, materials, group or TPGroup.single(), layers)
    return builder.build(max_position, tied=tied)


class _Builder:
    """Reads and assembles what one rank runs."""

    def __init__(self, config: ModelConfig, materials: Materials, group: TPGroup, layers: range) -> None:
        self._config = config
        self._materials = materials
        self._target = materials.target
        self._group = group
        self._shape = group.shape(config)
        self._stage = layers
        self._local = self._shape.local(config, layers)
        self._parts = PartReader(config, self._shape, materials.read_linear)

    def build(self, max_position: int, *, tied: bool) -> Decoder:
        config, target = self._config, self._target
        is_last = self._stage.stop == config.num_layers
        embedding = self._embedding() if self._stage.start == 0 else None
        layers = [self._layer(layer) for layer in self._stage]
        rope = RotaryEmbedding(config.rope, config.head_dim, max_position, target.device)
        norm = self._norm(TensorShape(FINAL_NORM, (config.hidden_size,))) if is_last else None
        is_whole = embedding is not None and self._group.size == 1
        return Decoder(
            self._local,
            target.dtype,
            layers,
            rope,
            self._group,
            embedding=embedding,
            norm=norm,
            head=self._head(embedding, tied=tied) if is_last else None,
            stack=try_stack(target, layers, norm, rope) if is_whole else None,
        )

    def _embedding(self) -> Embedding:
        vocab = self._shape.vocab
        table = self._materials.read_tensor(
            TensorShape(EMBEDDING + ".weight", (self._config.vocab_size, self._config.hidden_size))
        )
        if len(vocab) < len(table):
            # A copy, so that the whole table can go.
            table = table[vocab.start : vocab.stop].clone()
        return Embedding(table.to(device=self._target.device, dtype=self._target.dtype), vocab.start, self._group)

    def _head(self, embedding: Embedding | None, *, tied: bool) -> Linear:
        weight = self._materials.read_linear(head_linear(self._config, tied=tied))
        if tied and embedding is not None and isinstance(weight, DenseWeight):
            weight = DenseWeight(embedding.table)  # One table in memory, not two.
        else:
            weight = slice_outputs(weight, self._shape.vocab)
        return Linear(HEAD, [weight], self._target, is_sensitive=True)

    def _layer(self, layer: int) -> DecoderLayer:
        """One layer's worth: a merged linear is on its device, and its parts are gone, before the next is read."""
        config, local, ops = self._config, self._local, self._target.ops
        input_norm, post_norm, *head_norms = layer_norms(config, layer)
        qkv, o, gate_up, down = merged_linears(config, layer)
        # In the order of `slots`. Sensitive are all but gate_up, which is half of a layer's weights and a quarter of
        # what coarse activations cost (docs/cpu.md).
        gate_up_linear, down_linear = self._folded_mlp(gate_up, down)
        qkv_linear = Linear(qkv.name, self._parts.qkv(qkv), self._target, is_sensitive=True)
        o_linear = Linear(o.name, self._parts.o(o), self._target, is_sensitive=True)
        heads = Heads(
            local.num_heads,
            local.num_kv_heads,
            local.head_dim,
            window=config.windows[layer],
            norms=torch.stack([self._tensor(shape) for shape in head_norms]) if head_norms else None,
            norm_eps=config.rms_norm_eps,
        )
        attention = Attention(qkv_linear, o_linear, heads, ops, self._group)
        mlp = GatedMLP(gate_up_linear, down_linear, ops, self._group)
        return DecoderLayer(self._norm(input_norm), attention, self._norm(post_norm), mlp)

    def _folded_mlp(self, gate_up: MergedShape, down: MergedShape) -> tuple[Linear, Linear]:
        """gate_up and down, whose activation order moves into the outputs of gate and up: so down is read first."""
        weights, order = self._parts.down(down)
        down_linear = Linear(down.name, weights, self._target, order_is_folded=order is not None, is_sensitive=True)
        del weights
        return Linear(gate_up.name, self._parts.gate_up(gate_up, order), self._target), down_linear

    def _norm(self, shape: TensorShape) -> RMSNorm:
        return RMSNorm(self._tensor(shape), self._config.rms_norm_eps, self._target.ops)

    def _tensor(self, shape: TensorShape) -> torch.Tensor:
        return self._materials.read_tensor(shape).to(device=self._target.device, dtype=self._target.dtype)
