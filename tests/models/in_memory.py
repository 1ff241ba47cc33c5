"""Decoders built from a dictionary of dense tensors, and one-call forward passes, for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from qengine.config import ModelConfig
from qengine.models.decoder import Decoder, Materials, build
from qengine.models.shapes import EMBEDDING, LinearShape, TensorShape
from qengine.parallel.group import TPGroup
from qengine.runtime.inputs import CpuSteps, PreparedStep, Steps
from qengine.runtime.kv_cache import KVCache
from qengine.scheduling.batch import Batch, BatchEntry
from quant_kernels.attention.kv_format import KVFormat, plain
from quant_kernels.linear.dispatch import Target
from quant_kernels.packed_weight import DenseWeight

CPU = torch.device("cpu")
FLOAT32 = plain(torch.float32)


CPU_TARGET = Target(CPU, torch.float32)


def build_from_state(
    config: ModelConfig,
    state: Mapping[str, torch.Tensor],
    target: Target = CPU_TARGET,
    group: TPGroup | None = None,
    layers: range | None = None,
) -> Decoder:
    """A decoder from checkpoint-named tensors, in float32 unless told; the head is tied when the config says so."""

    def read_tensor(shape: TensorShape) -> torch.Tensor:
        tensor = state[shape.name]
        assert tuple(tensor.shape) == shape.shape, shape.name
        return tensor

    def read_linear(shape: LinearShape) -> DenseWeight:
        weight = state[shape.name + ".weight"]
        assert tuple(weight.shape) == (shape.out_features, shape.in_features), shape.name
        bias = state[shape.name + ".bias"] if shape.has_bias else None
        return DenseWeight(weight, bias)

    materials = Materials(read_tensor, read_linear, target)
    assert EMBEDDING + ".weight" in state
    tied, longest = config.tie_word_embeddings, config.max_position
    return build(config, materials, tied=tied, max_position=longest, group=group, layers=layers)


class Sequences:
    """Runs a decoder over several sequences at will, keeping their cached keys and values.

    `steps` prepares steps of `block_size` for the decoder's device; by default the CPU's.
    """

    def __init__(
        self,
        model: Decoder,
        num_blocks: int = 64,
        block_size: int = 4,
        kv_format: KVFormat = FLOAT32,
        steps: Steps | None = None,
    ) -> None:
        self.model = model
        self.cache = KVCache(model.config, num_blocks, block_size, kv_format, CPU)
        self.steps = steps or CpuSteps(model.rope, self.cache, model.dtype)
        self.tables: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}
        # Handed out from both ends in turn, so that tables are not consecutive.
        self.free = [b for pair in zip(range(num_blocks // 2), reversed(range(num_blocks)), strict=False) for b in pair]

    def step(self, tokens: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
        """Compute the given next tokens of each sequence; float32 logits [tokens, vocab] of each."""
        step = self.prepare(tokens)
        return self.logits(self.forward(step.token_ids, step), step)

    def prepare(self, tokens: Mapping[str, Sequence[int]]) -> PreparedStep:
        """Give the next tokens of each sequence their places."""
        entries = []
        for name, ids in tokens.items():
            start = self.lengths.get(name, 0)
            table = self.tables.setdefault(name, [])
            while len(table) * self.cache.block_size < start + len(ids):
                table.append(self.free.pop())
            self.lengths[name] = start + len(ids)
            entries.append(BatchEntry(name, tuple(ids), start, tuple(table), None))
        return self.steps.prepare(Batch(tuple(entries)))

    @torch.inference_mode()
    def forward(self, x: torch.Tensor, step: PreparedStep) -> torch.Tensor:
        """`Decoder.forward` over the cache."""
        return self.model.forward(x, self.cache.layers, step.inputs)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor, step: PreparedStep) -> dict[str, torch.Tensor]:
        """Of each sequence's tokens in the step."""
        logits = self.model.logits(hidden)
        return {
            e.request_id: logits[row : row + e.num_tokens] for e, row in zip(step.entries, step.first_rows, strict=True)
        }
