"""How many bytes a model takes on each rank, from its headers: weights as they are once prepared, KV, and a step.

Weights are exact as far as headers tell; what a step and its graphs take are bounds that follow from the sizes.
Invariant: a rank is charged for what it holds, kv heads that others hold too and padding included. Nothing is allocated
and torch is not imported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from qengine.config import ModelConfig
from qengine.models.shapes import all_merged_linears, mlp_linears
from qengine.parallel.split import RankShape, TPSplit, split_model
from qengine.runtime.opening import OpenedHeaders
from quant_kernels.footprint import (
    DTYPE_BYTES,
    Kernels,
    WeightFacts,
    cut_inputs,
    fuse,
    gathered_bytes,
    native_linear_room,
    native_stack_room,
    prepared_parts,
)

_MIB = 2**20
_GIB = 2**30
HEAD = "head"
#: A logit in the model's dtype, in float32, edited, and as a log-probability that is compared with others.
_LOGIT_BYTES = 2 + 4 + 4 + 4 + 1
#: Prompt positions whose logits are held at once, when those of the rows that are sampled are gone.
LOGPROB_ROWS = 32
#: Slices of an expanded weight, partial sums of the widest linear, a step's integers, and cuBLAS's own room.
_SCRATCH_BYTES = 384 * _MIB
_CPU_SCRATCH_BYTES = 64 * _MIB
#: Query tokens whose attention may be in parts at one time; their partial results take memory.
NUM_SLOTS = 1024
#: What a graph of a whole model takes beside its tensors. Not measured yet: a few hundred nodes of some kilobytes.
GRAPH_BYTES = 8 * _MIB
#: Batch sizes whose decode steps are recorded as graphs; larger batches, and mixed ones, run eagerly.
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
#: Tokens of one step by default: on a CPU, so that a long prompt does not stall the others; on a GPU; on large ones.
CPU_BATCHED_TOKENS = 256
BATCHED_TOKENS, LARGE_BATCHED_TOKENS, LARGE_CARD_BYTES = 2048, 8192, 70 * _GIB
#: Integers of one item of attention's work, and bytes of each.
ITEM_FIELDS, _INT_BYTES = 9, 4


@dataclass(frozen=True, slots=True)
class MergedFacts:
    """One linear as it runs, and how many layers have one like it: "qkv", "o", "gate_up", "down" or "head"."""

    role: str
    parts: tuple[WeightFacts, ...]
    count: int


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A model, or one stage of its pipeline, as the planner sees it.

    Attributes:
        tied: the head multiplies by the embedding's table.
        has_table: the embedding is here: not so in a pipeline's later stages.
        has_head: final norm and head are here: not so in its earlier ones.
        stages: the same in parts, where the ranks of a whole pipeline share one memory.
        other_downs: each kind of down_proj in the layers of other stages, whose groups every stage's cuts heed.
        bits, group_size: of its quantized linears, as the file or its config says; None where there are none.
    """

    name: str
    config: ModelConfig
    tied: bool
    linears: tuple[MergedFacts, ...]
    description: str = ""
    quantization: str | None = None
    bits: int | None = None
    group_size: int | None = None
    has_table: bool = True
    has_head: bool = True
    other_downs: tuple[WeightFacts, ...] = ()
    stages: tuple[ModelFacts, ...] = ()

    @classmethod
    def of(cls, opened: OpenedHeaders, layers: range | None = None) -> ModelFacts:
        """The facts of an opened model. Reads no weight.

        Args:
            layers: of one pipeline stage; None for all.
        """
        config = opened.config
        has_table = layers is None or layers.start == 0
        has_head = layers is None or layers.stop == config.num_layers
        if layers is not None:
            config = replace(config, num_layers=len(layers), windows=config.windows[layers.start : layers.stop])
        counts: Counter[tuple[str, tuple[WeightFacts, ...]]] = Counter()
        for shape in all_merged_linears(opened.config, tied=opened.tied, layers=layers):
            if _role(shape.name) == HEAD and not has_head:
                continue
            parts = tuple(opened.facts(part) for part in shape.parts)
            if shape.folds_order:
                parts = tuple(replace(part, has_order=False) for part in parts)
            counts[(_role(shape.name), parts)] += 1
        linears = tuple(MergedFacts(role, parts, count) for (role, parts), count in counts.items())
        first = next((p for linear in linears for p in linear.parts if p.bits is not None), None)
        scheme = getattr(opened.source, "scheme", None)
        return cls(
            name=opened.location.name,
            config=config,
            tied=opened.tied,
            linears=linears,
            description=opened.source.description,
            quantization=opened.source.quantization,
            bits=getattr(scheme, "bits", None) or (None if first is None else first.bits),
            group_size=None if first is None else -1 if first.is_one_group else first.group_size,
            has_table=has_table,
            has_head=has_head,
            other_downs=_other_downs(opened, layers),
        )

    def down_groups(self) -> set[int | None]:
        """Group sizes of all down_proj of the whole model, as `split_model` wants them."""
        parts = [linear.parts[0] for linear in self.linears if linear.role == "down"]
        parts += self.other_downs
        return {None if p.bits is None else -1 if p.is_one_group else p.group_size for p in parts}

    def split(self, num_ranks: int, shares: tuple[float, ...] | None = None) -> TPSplit:
        """What every rank owns. Raises ConfigError where there is not enough to share."""
        return split_model(self.config, num_ranks, down_groups=self.down_groups(), weights=shares)


def _other_downs(opened: OpenedHeaders, layers: range | None) -> tuple[WeightFacts, ...]:
    """Each kind of down_proj outside `layers`; None for nothing outside."""
    if layers is None:
        return ()
    others = (layer for layer in range(opened.config.num_layers) if layer not in layers)
    return tuple(dict.fromkeys(opened.facts(mlp_linears(opened.config, layer)[-1]) for layer in others))


def _role(name: str) -> str:
    """ "model.layers.0.self_attn.qkv_proj" is "qkv", "lm_head" is "head"."""
    return name.rpartition(".")[2].removesuffix("_proj").removeprefix("lm_")


# Weights


def weight_parts(model: ModelFacts, rank: RankShape, kernels: Kernels, dtype: str) -> Iterator[tuple[int, int]]:
    """Every tensor of a rank's weights: its bytes, and how many there are like it."""
    config, number = model.config, DTYPE_BYTES[dtype]
    if model.has_table:
        yield len(rank.vocab) * config.hidden_size * number, 1
    yield config.hidden_size * number, 2 * config.num_layers + model.has_head
    if config.qk_norm:
        yield 2 * config.head_dim * number, config.num_layers
    for linear in model.linears:
        parts = _parts_on_rank(linear, rank, config.head_dim)
        if linear.role == HEAD and model.tied and model.has_table and parts[0].bits is None:
            continue  # The embedding's own table.
        for whole in fuse(parts):
            yield from ((num_bytes, linear.count) for num_bytes in prepared_parts(whole, kernels, dtype))


def weight_bytes(model: ModelFacts, rank: RankShape, kernels: Kernels, dtype: str) -> int:
    """Bytes of a rank's weights: linears, embedding and norms."""
    return sum(num_bytes * count for num_bytes, count in weight_parts(model, rank, kernels, dtype))


def layers_bytes(model: ModelFacts, rank: RankShape, kernels: Kernels, dtype: str) -> int:
    """The same of its layers alone, without embedding, final norm and head."""
    linears = tuple(linear for linear in model.linears if linear.role != HEAD)
    return weight_bytes(replace(model, linears=linears, has_table=False, has_head=False), rank, kernels, dtype)


def _parts_on_rank(linear: MergedFacts, rank: RankShape, head_dim: int) -> tuple[WeightFacts, ...]:
    return tuple(_on_rank(linear.role, index, part, rank, head_dim) for index, part in enumerate(linear.parts))


def _on_rank(role: str, index: int, part: WeightFacts, rank: RankShape, head_dim: int) -> WeightFacts:
    """The part of a linear that a rank owns."""
    if role in ("o", "down"):
        inputs = rank.intermediate
        if role == "o":
            inputs = range(rank.query_heads.start * head_dim, rank.query_heads.stop * head_dim)
        return cut_inputs(part, inputs, with_bias=rank.rank == 0)
    outputs = {"head": len(rank.vocab), "gate_up": len(rank.intermediate)}.get(role)
    if outputs is None:
        outputs = head_dim * len(rank.query_heads if index == 0 else rank.kv_heads)
    return replace(part, out_features=outputs)


def rounding_bytes(sizes: Iterable[tuple[int, int]]) -> int:
    """What torch's allocator on a GPU takes beyond the tensors: it hands out whole segments."""
    return sum((_segment_share(num_bytes) - num_bytes) * count for num_bytes, count in sizes)


def _segment_share(num_bytes: int) -> int:
    """A tensor's share of the segments it lies in: 2 MiB for small ones, 20 MiB for medium, whole MiB for large."""
    if num_bytes <= _MIB:
        return -(-num_bytes // 512) * 512
    if num_bytes < 10 * _MIB:
        return 20 * _MIB // (20 * _MIB // num_bytes)
    return -(-num_bytes // (2 * _MIB)) * 2 * _MIB


# Steps


def buckets(max_num_seqs: int) -> tuple[int, ...]:
    """The batch sizes that are recorded where up to `max_num_seqs` sequences run."""
    return tuple(b for b in BUCKETS if b < max_num_seqs) + tuple(b for b in BUCKETS if b >= max_num_seqs)[:1]


def activation_bytes(model: ModelConfig, rows: int) -> int:
    """Bytes of 16-bit activations alive at once, at most, in a step of `rows` tokens; partial sums not counted."""
    attention = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    # The residual, two norms, and what attention and the layer before left live on while gate, up and product are made.
    return 2 * rows * (5 * model.hidden_size + max(attention, 3 * model.intermediate_size))


def attention_scratch_bytes(model: ModelConfig) -> int:
    """Attention's partial results on a GPU: sums, two statistics per head, and counters."""
    return NUM_SLOTS * (model.num_heads * (model.head_dim + 2) * 4 + model.num_kv_heads * _INT_BYTES)


def rope_bytes(model: ModelConfig, max_position: int) -> int:
    """Cosines and sines in float32."""
    return 4 * max_position * model.head_dim


def step_bytes(
    model: ModelConfig,
    rows: int,
    max_num_seqs: int,
    max_position: int,
    *,
    kv_number_bytes: int,
    num_ranks: int = 1,
    has_head: bool = True,
    on_gpu: bool = True,
) -> int:
    """Bytes beside weights and cache that a step takes at most.

    Args:
        model: what the rank has; its vocabulary is whole, since logits are.
        rows, max_num_seqs: tokens of the step, and those of them that are sampled.
        max_position: positions that rope's tables are made for.
        kv_number_bytes: of a number in the cache.
        num_ranks: with several, sums and logits of all ranks are gathered.
        has_head: a pipeline's earlier stages have no logits.
    """
    num_logits = max(max_num_seqs, LOGPROB_ROWS) * model.vocab_size if has_head else 0
    logits = num_logits * _LOGIT_BYTES
    gathered = 2 * (2 * rows * model.hidden_size + num_logits) if num_ranks > 1 else 0
    if on_gpu:
        scratch = attention_scratch_bytes(model) + _SCRATCH_BYTES
    else:
        keys_and_values = gathered_bytes(model.num_kv_heads, model.head_dim, kv_number_bytes, max_position)
        scratch = keys_and_values + _CPU_SCRATCH_BYTES
    return activation_bytes(model, rows) + logits + gathered + rope_bytes(model, max_position) + scratch


def native_room_bytes(model: ModelFacts, rank: RankShape, rows: int, num_threads: int) -> int:
    """Scratch that the CPU's own kernels hold at most, beside `step_bytes`: one place, for whichever call needs most.

    Args:
        rows: tokens of a step, or sampled ones where those are more.
        num_threads: that a call may run on.
    """
    local = rank.local(model.config)
    parts = [part for linear in model.linears for part in _parts_on_rank(linear, rank, local.head_dim)]
    inputs = local.hidden_size, local.intermediate_size, local.num_heads * local.head_dim
    widest = max(*inputs, *(part.in_features for part in parts))  # Padding makes some wider than that.
    heads = local.num_heads, local.num_kv_heads, local.head_dim
    stack = native_stack_room(rows, widest, local.intermediate_size, heads, num_threads)
    return max(stack, native_linear_room(rows, widest, num_threads))


def graph_bytes(model: ModelConfig, max_num_seqs: int, max_position: int, block_size: int) -> int:
    """Bytes of all recorded decode steps: one pool for their activations, and inputs, results and nodes of each."""
    sizes = buckets(max_num_seqs)
    num_windows, max_blocks = len(set(model.windows)) or 1, -(-max_position // block_size)
    each = (2 * model.hidden_size * b + static_input_bytes(b, max_blocks, num_windows) + GRAPH_BYTES for b in sizes)
    return activation_bytes(model, sizes[-1]) + sum(each)


def static_input_bytes(num_rows: int, max_blocks: int, num_windows: int) -> int:
    """Fixed places for the integers of a step of `num_rows` sequences, at most: every array begins at 16 bytes."""
    items = (num_rows + NUM_SLOTS) * ITEM_FIELDS
    numbers = 3 * (num_rows + 3) + num_windows * (4 + items + 3) + num_rows * max_blocks + 3
    return _INT_BYTES * numbers
