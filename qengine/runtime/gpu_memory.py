"""What a card has left for the KV cache, once weights, steps and graphs have theirs.

Weights are counted as they are, since they are there before the cache is made; a step's memory and the graphs' are
bounds that follow from the model's sizes. Invariant: what is promised to the cache never exceeds what the user allows,
nor what the card has. Nothing is allocated here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qengine.config import CacheConfig, ModelConfig
from qengine.errors import ConfigError
from qengine.runtime.planner import size_text

_GIB = 2**30
#: The driver's own memory per process: code, stacks, libraries.
CONTEXT_BYTES = _GIB // 2
#: What a graph of a whole model takes beside its tensors. Not measured yet: a few hundred nodes of some kilobytes.
GRAPH_BYTES = 8 * 2**20
#: A logit in the model's dtype, in float32, edited, and as a log-probability that is compared with others.
_LOGIT_BYTES = 2 + 4 + 4 + 4 + 1
#: Slices of an expanded weight, partial sums of the widest linear and of attention, cuBLAS's own room, and what torch's
#: allocator loses in its segments.
_SCRATCH_BYTES = 384 * 2**20
#: Batch sizes whose decode steps are recorded as graphs; larger batches, and mixed ones, run eagerly.
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
#: Tokens of one step by default, and on cards of at least so many bytes.
BATCHED_TOKENS, LARGE_BATCHED_TOKENS, LARGE_CARD_BYTES = 2048, 8192, 70 * _GIB


@dataclass(frozen=True, slots=True)
class GpuBudget:
    """Bytes of one card by purpose. `total` is what this process may take in all."""

    total: int
    weights: int
    step: int
    graphs: int
    context: int

    @property
    def kv_cache(self) -> int:
        """What is left."""
        return max(0, self.total - self.weights - self.step - self.graphs - self.context)

    @property
    def text(self) -> str:
        """One line, for the log."""
        parts = {"weights": self.weights, "a step": self.step, "graphs": self.graphs, "the driver": self.context}
        named = ", ".join(f"{size_text(value)} for {name}" for name, value in parts.items())
        return f"{size_text(self.total)} = {named}, {size_text(self.kv_cache)} for the KV cache"


def allowed_bytes(cache: CacheConfig, device: torch.device) -> int:
    """What this process may take of the card: the limit, else the share, and never more than is free.

    Raises:
        ConfigError: if the limit exceeds the card.
    """
    free, total = torch.cuda.mem_get_info(device)
    if cache.gpu_memory_limit is None:
        allowed = int(total * cache.gpu_memory_utilization)
    elif cache.gpu_memory_limit > total:
        raise ConfigError(
            f"gpu_memory_limit is {size_text(cache.gpu_memory_limit)}, but the GPU has {size_text(total)}; lower it"
        )
    else:
        allowed = cache.gpu_memory_limit
    return min(allowed, free + torch.cuda.memory_reserved(device))


def cap_process(allowed: int, device: torch.device) -> None:
    """Make torch fail rather than take more than is allowed beside the driver, so that a smaller card can be tried on a
    larger one. Holds for the whole process until it is set anew."""
    total = torch.cuda.mem_get_info(device)[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(1, allowed - CONTEXT_BYTES) / total), device)


def taken_bytes(device: torch.device) -> int:
    """What torch holds of the card, after it has given back what it does not need."""
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def default_batched_tokens(device: torch.device) -> int:
    """Tokens of one step, by the card's size."""
    total = torch.cuda.mem_get_info(device)[1]
    return LARGE_BATCHED_TOKENS if total >= LARGE_CARD_BYTES else BATCHED_TOKENS


def plan_gpu(
    model: ModelConfig, allowed: int, weights: int, *, batched_tokens: int, max_num_seqs: int, with_graphs: bool
) -> GpuBudget:
    """Share out the allowed bytes.

    Args:
        weights: bytes that are taken already.
        batched_tokens, max_num_seqs: rows of a step, and those of them that are sampled.
    """
    step = step_bytes(model, batched_tokens) + max_num_seqs * model.vocab_size * _LOGIT_BYTES + _SCRATCH_BYTES
    graphs = 0
    if with_graphs:
        sizes = buckets(max_num_seqs)
        graphs = step_bytes(model, sizes[-1]) + sum(2 * model.hidden_size * b + GRAPH_BYTES for b in sizes)
    return GpuBudget(allowed, weights, step, graphs, CONTEXT_BYTES)


def buckets(max_num_seqs: int) -> tuple[int, ...]:
    """The batch sizes that are recorded where up to `max_num_seqs` sequences run."""
    return tuple(b for b in BUCKETS if b < max_num_seqs) + tuple(b for b in BUCKETS if b >= max_num_seqs)[:1]


def step_bytes(model: ModelConfig, rows: int) -> int:
    """Bytes of 16-bit activations alive at once, at most, in a step of `rows` tokens; partial sums not counted."""
    attention = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    # The residual, two norms, and what attention and the layer before left live on while gate, up and product are made.
    return 2 * rows * (5 * model.hidden_size + max(attention, 3 * model.intermediate_size))
