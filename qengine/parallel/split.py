"""Which part of a model every rank owns: heads, intermediate columns, vocabulary, and the layers of a stage.

Tensor parallelism splits every layer, and pipeline parallelism hands out whole layers. Invariant: the parts of all
ranks add up to the whole, in order; they follow from the arguments alone, so that every rank and the planner work out
the same. Only key and value heads may be on several ranks. Plain Python: no weight is read, and torch is not imported.

    query heads   in whole kv groups where there are enough of them; else a kv head's queries are shared out among
                  neighbouring ranks, which each keep a copy of it. So the ratio of queries to kv heads is one number
                  within a rank, as attention wants it, and no rank caches more than it reads.
    intermediate  outputs of gate and up = inputs of down, cut between down's groups.
    vocabulary    rows of the embedding and of the head, cut where kernels' tiles end.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from qengine.config import ModelConfig
from qengine.errors import ConfigError

#: Cuts fall on a multiple of the first of these that leaves something for every rank: what tiles are made of.
ALIGNMENTS = (128, 64, 32, 16, 8)
#: Codes of a quantized weight are packed in words of up to so many inputs.
_WORD_INPUTS = 8


@dataclass(frozen=True, slots=True)
class RankShape:
    """What one tensor-parallel rank owns of every layer, as ranges of the whole.

    Attributes:
        query_heads: outputs of q, inputs of o.
        kv_heads: outputs of k and v, and the cache; other ranks may have copies of them.
        intermediate: outputs of gate and up, inputs of down.
        vocab: rows of the embedding and outputs of the head.
    """

    rank: int
    query_heads: range
    kv_heads: range
    intermediate: range
    vocab: range

    def local(self, config: ModelConfig) -> ModelConfig:
        """The config of a model that has only this rank's heads and intermediate columns; the vocabulary is whole."""
        return replace(
            config,
            num_heads=len(self.query_heads),
            num_kv_heads=len(self.kv_heads),
            intermediate_size=len(self.intermediate),
        )


@dataclass(frozen=True, slots=True)
class TPSplit:
    """All ranks' parts, by rank."""

    ranks: tuple[RankShape, ...]

    @property
    def vocab_sizes(self) -> tuple[int, ...]:
        """Widths of the ranks' logits."""
        return tuple(len(shape.vocab) for shape in self.ranks)


def split_model(
    config: ModelConfig,
    num_ranks: int,
    *,
    down_groups: Collection[int | None] = (),
    weights: Sequence[float] | None = None,
) -> TPSplit:
    """What each of `num_ranks` tensor-parallel ranks owns.

    Args:
        down_groups: group sizes of all layers' down_proj; None for one that is not quantized, -1 for a single group.
        weights: how much each rank can take, in any unit; None for alike.

    Raises:
        ConfigError: if a rank would be left without a head, a group of down_proj or a row of the vocabulary.
    """
    loads = _checked_weights(num_ranks, weights, "tensor_parallel_size")
    heads = list(_split_heads(config, loads))
    inner = _split_intermediate(config.intermediate_size, loads, down_groups)
    vocab = _split_vocab(config.vocab_size, loads)
    ranks = (RankShape(r, *h, i, v) for r, (h, i, v) in enumerate(zip(heads, inner, vocab, strict=True)))
    return TPSplit(tuple(ranks))


def stage_layers(num_layers: int, num_stages: int, weights: Sequence[float] | None = None) -> tuple[range, ...]:
    """The layers of each pipeline stage, in order; the first has the embedding besides, the last norm and head.

    Args:
        weights: how much each stage can take, in any unit; None for alike.

    Raises:
        ConfigError: if there are fewer layers than stages.
    """
    loads = _checked_weights(num_stages, weights, "pipeline_parallel_size")
    if num_layers < num_stages:
        raise ConfigError(
            f"pipeline_parallel_size is {num_stages}, but the model has {num_layers} layers, and a stage needs at "
            f"least one; use at most {num_layers}"
        )
    return _ranges(share_out(num_layers, loads), num_layers)


def regrouped(group_size: int, first_input: int) -> int:
    """The largest group that divides `group_size` and starts at `first_input`: a cut group's parts are such groups.

    The rows of scales and zero points are repeated for them, so nothing is rounded.
    """
    return math.gcd(group_size, first_input)


def share_out(num_units: int, weights: Sequence[float]) -> list[int]:
    """Units for each rank, at least one, so that the greatest ratio of units to weight is the least possible.

    Ties go to the first, so 231 units make 116 + 115. `num_units` must not be below the number of ranks.
    """
    units = [1] * len(weights)
    queue = [(2 / weight, rank) for rank, weight in enumerate(weights)]
    heapq.heapify(queue)
    for _ in range(num_units - len(weights)):
        _, rank = queue[0]
        units[rank] += 1
        heapq.heapreplace(queue, ((units[rank] + 1) / weights[rank], rank))
    return units


def _checked_weights(num_ranks: int, weights: Sequence[float] | None, option: str) -> Sequence[float]:
    if num_ranks < 1:
        raise ConfigError(f"{option} is {num_ranks}, expected at least 1")
    if weights is None:
        return [1.0] * num_ranks
    if len(weights) != num_ranks:
        raise ConfigError(f"{option} is {num_ranks}, but {len(weights)} sizes of cards are given; give one for each")
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ConfigError(f"the sizes of the cards are {list(weights)}, expected finite numbers above zero")
    return weights


def _ranges(units: Sequence[int], total: int, unit: int = 1) -> tuple[range, ...]:
    """Neighbouring ranges of so many units each; the last unit may be cut short by `total`."""
    stops = [sum(units[: i + 1]) * unit for i in range(len(units))]
    return tuple(range(start, min(stop, total)) for start, stop in zip([0, *stops], stops, strict=False))


def _split_heads(config: ModelConfig, loads: Sequence[float]) -> Iterator[tuple[range, range]]:
    """(query heads, kv heads) of each rank."""
    num_heads, num_kv_heads, num_ranks = config.num_heads, config.num_kv_heads, len(loads)
    if num_heads % num_kv_heads:
        raise ConfigError(f"the model's {num_heads} query heads are no multiple of its {num_kv_heads} kv heads")
    if num_ranks > num_heads:
        raise ConfigError(
            f"tensor_parallel_size is {num_ranks}, but the model has {num_heads} query heads, and a rank needs at "
            f"least one; use at most {num_heads}"
        )
    ratio = num_heads // num_kv_heads
    if num_ranks <= num_kv_heads:
        for kv in _ranges(share_out(num_kv_heads, loads), num_kv_heads):
            yield range(kv.start * ratio, kv.stop * ratio), kv
        return
    first_rank = 0
    for kv_head, count in enumerate(share_out(num_ranks, [1.0] * num_kv_heads)):
        sharers = loads[first_rank : first_rank + count]
        first_rank += count
        for part in _ranges(share_out(ratio, sharers), ratio):
            first = kv_head * ratio
            yield range(first + part.start, first + part.stop), range(kv_head, kv_head + 1)


def _split_intermediate(size: int, loads: Sequence[float], groups: Collection[int | None]) -> tuple[range, ...]:
    """Cuts are between groups of every layer's down_proj; aligned beyond that only where it costs no balance."""
    step = math.lcm(*(_step(group, size) for group in groups))
    aligned = (math.lcm(step, alignment) for alignment in ALIGNMENTS)
    unit = next((u for u in aligned if size % u == 0 and size // u >= len(loads)), step)
    num_units = -(-size // unit)
    if num_units < len(loads):
        raise ConfigError(
            f"tensor_parallel_size is {len(loads)}, but down_proj has {num_units} groups of {unit} inputs to hand out, "
            f"and a rank needs at least one; use at most {num_units}, or a smaller group size"
        )
    return _ranges(share_out(num_units, loads), size, unit)


def _step(group: int | None, size: int) -> int:
    """The inputs of down_proj that must stay together."""
    if group is None:
        return 1
    is_one_group = group < 0 or group >= size
    return _WORD_INPUTS if is_one_group else math.lcm(group, _WORD_INPUTS)


def _split_vocab(size: int, loads: Sequence[float]) -> tuple[range, ...]:
    if size < len(loads):
        raise ConfigError(
            f"tensor_parallel_size is {len(loads)}, but the vocabulary has {size} entries; use at most {size}"
        )
    unit = next((a for a in ALIGNMENTS if -(-size // a) >= len(loads)), 1)
    return _ranges(share_out(-(-size // unit), loads), size, unit)
