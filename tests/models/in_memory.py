"""Decoders built from a dictionary of dense tensors, and one-call forward passes, for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from qengine.config import ModelConfig
from qengine.models.decoder import EMBEDDING, Decoder, LinearShape, Materials, TensorShape, build
from qengine.runtime.inputs import prepare_step
from qengine.runtime.kv_cache import KVCache
from qengine.scheduling.batch import Batch, BatchEntry
from quant_kernels.attention.kv_format import plain
from quant_kernels.linear.dispatch import Target
from quant_kernels.packed_weight import DenseWeight

CPU = torch.device("cpu")


def build_from_state(config: ModelConfig, state: Mapping[str, torch.Tensor]) -> Decoder:
    """A float32 decoder from checkpoint-named tensors; the head is tied when the config says so."""

    def read_tensor(shape: TensorShape) -> torch.Tensor:
        tensor = state[shape.name]
        assert tuple(tensor.shape) == shape.shape, shape.name
        return tensor

    def read_linear(shape: LinearShape) -> DenseWeight:
        weight = state[shape.name + ".weight"]
        assert tuple(weight.shape) == (shape.out_features, shape.in_features), shape.name
        bias = state[shape.name + ".bias"] if shape.has_bias else None
        return DenseWeight(weight, bias)

    materials = Materials(read_tensor, read_linear, Target(CPU, torch.float32))
    assert EMBEDDING + ".weight" in state
    return build(config, materials, tied=config.tie_word_embeddings, max_position=config.max_position)


class Sequences:
    """Runs a decoder over several sequences at will, keeping their cached keys and values."""

    def __init__(self, model: Decoder, num_blocks: int = 64, block_size: int = 4) -> None:
        self.model = model
        self.cache = KVCache(model.config, num_blocks, block_size, plain(torch.float32), CPU)
        self.tables: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}
        # Handed out from both ends in turn, so that tables are not consecutive.
        self.free = [b for pair in zip(range(num_blocks // 2), reversed(range(num_blocks)), strict=False) for b in pair]

    @torch.inference_mode()
    def step(self, tokens: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
        """Compute the given next tokens of each sequence; float32 logits [tokens, vocab] of each."""
        entries = []
        for name, ids in tokens.items():
            start = self.lengths.get(name, 0)
            table = self.tables.setdefault(name, [])
            while len(table) * self.cache.block_size < start + len(ids):
                table.append(self.free.pop())
            self.lengths[name] = start + len(ids)
            entries.append(BatchEntry(name, tuple(ids), start, tuple(table), None))
        step = prepare_step(Batch(tuple(entries)), self.model.rope, self.cache.block_size, torch.float32)
        logits = self.model.logits(self.model.forward(step.token_ids, self.cache.layers, step.inputs))
        return {
            e.request_id: logits[row : row + e.num_tokens] for e, row in zip(step.entries, step.first_rows, strict=True)
        }
