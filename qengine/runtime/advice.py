"""What would make a plan fit, or fit a longer context: each change is really planned, and only what works is said.

Invariant: following any one line of the advice gives the context that the line names. Changes are flags of the user's,
or properties of another checkpoint of the same model. Plans alone are made here; nothing is allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from qengine.config import EngineConfig
from qengine.errors import ConfigError
from qengine.runtime.model_bytes import HEAD, MergedFacts, ModelFacts
from qengine.runtime.planner import Machine, MemoryPlan, batched_tokens, make_plan
from quant_kernels.footprint import WeightFacts, kv_number_bytes

#: A longer context is worth a line if it is longer by this factor.
_WORTH = 1.25
_KV_DTYPES = ("int8", "fp8")
_FEW_SEQS, _FEW_TOKENS = 16, 512
_HIGH_UTILIZATION = 0.97
_GROUP_SIZES = (32, 64, 128, -1)
_USUAL_GROUP = 128
_MOST_RANKS = 8


@dataclass(frozen=True, slots=True)
class _Case:
    """A request with some changes, in words."""

    changes: tuple[str, ...]
    model: ModelFacts
    config: EngineConfig
    machine: Machine

    def then(self, change: str, **parts: Any) -> _Case:
        """The same with one change more."""
        return replace(self, changes=(*self.changes, change), **parts)

    def plan(self) -> MemoryPlan | None:
        """None where the changed request is refused."""
        try:
            return make_plan(self.model, self.config, self.machine)
        except ConfigError:
            return None


def advise(model: ModelFacts, config: EngineConfig, machine: Machine, plan: MemoryPlan) -> tuple[str, ...]:
    """One line for each change that helps; () where nothing needs to.

    Args:
        plan: what the request as it is came to.
    """
    if plan.fits and not plan.is_lowered:
        return ()
    start = _Case((), model, config, machine)
    alone = _helpful(_single_changes(start), plan)
    if not alone:
        alone = _helpful(_changes_together(start), plan)[:1]
    shorter = [] if plan.fits or not plan.max_model_len else [_shorter(plan)]
    more = _helpful(_more_cards(start), plan)[:1] or _helpful(_more_cards_and_less_else(start), plan)[:1]
    return (*shorter, *alone, *more) or (_hopeless(plan),)


def _helpful(cases: Iterator[_Case], plan: MemoryPlan) -> list[str]:
    return [line for case in cases if (line := _line(case, plan)) is not None]


def _shorter(plan: MemoryPlan) -> str:
    return f"--max-model-len {plan.max_model_len}: the longest context that fits"


def _line(case: _Case, before: MemoryPlan) -> str | None:
    """What a change achieves; None where it does not help."""
    found = case.plan()
    if found is None or not found.fits:
        return None
    if before.fits and found.max_model_len < min(before.wanted_len, before.max_model_len * _WORTH):
        return None
    return f"{', '.join(case.changes)}: fits a context of {found.max_model_len} tokens"


def _hopeless(plan: MemoryPlan) -> str:
    missing = max(0, *(-card.free_bytes for card in plan.cards))
    return (
        f"no flag makes it fit ({missing / 2**30:.2f} GiB are missing even without a KV cache): "
        "take a smaller model, or larger or more cards"
    )


def _single_changes(start: _Case) -> Iterator[_Case]:
    for change in _CHANGES:
        yield from change(start)


def _changes_together(start: _Case) -> Iterator[_Case]:
    """More and more changes, the least painful first."""
    case = start
    for change in _CHANGES:
        changed = next(change(case), None)
        if changed is not None:
            case = changed
            yield case


def _more_cards_and_less_else(start: _Case) -> Iterator[_Case]:
    for cards in _more_cards(start):
        for change in (_smaller_numbers, _fewer_sequences, _shorter_steps):
            cards = next(change(cards), cards)
            yield cards


def _own_cache_size(case: _Case) -> Iterator[_Case]:
    if case.config.cache.kv_cache_memory_bytes is not None:
        cache = replace(case.config.cache, kv_cache_memory_bytes=None)
        yield case.then("no --kv-cache-memory-bytes", config=replace(case.config, cache=cache))


def _smaller_numbers(case: _Case) -> Iterator[_Case]:
    if kv_number_bytes(case.config.cache.kv_cache_dtype, case.machine.dtype)[0] > 1:
        for name in _KV_DTYPES:
            cache = replace(case.config.cache, kv_cache_dtype=name)
            yield case.then(f"--kv-cache-dtype {name}", config=replace(case.config, cache=cache))


def _fewer_sequences(case: _Case) -> Iterator[_Case]:
    limits = case.config.scheduler
    if limits.max_num_seqs > _FEW_SEQS:
        few = replace(limits, max_num_seqs=_FEW_SEQS)
        yield case.then(f"--max-num-seqs {_FEW_SEQS}", config=replace(case.config, scheduler=few))


def _shorter_steps(case: _Case) -> Iterator[_Case]:
    limits = case.config.scheduler
    if batched_tokens(case.config, case.machine) > _FEW_TOKENS:
        short = replace(limits, max_num_batched_tokens=_FEW_TOKENS)
        yield case.then(f"--max-num-batched-tokens {_FEW_TOKENS}", config=replace(case.config, scheduler=short))


def _no_graphs(case: _Case) -> Iterator[_Case]:
    if case.machine.records_steps:
        yield case.then("--enforce-eager", machine=replace(case.machine, has_graphs=False))


def _more_of_the_card(case: _Case) -> Iterator[_Case]:
    cache = case.config.cache
    if case.machine.is_gpu and cache.gpu_memory_limit is None and cache.gpu_memory_utilization < _HIGH_UTILIZATION:
        more = replace(cache, gpu_memory_utilization=_HIGH_UTILIZATION)
        yield case.then(f"--gpu-memory-utilization {_HIGH_UTILIZATION}", config=replace(case.config, cache=more))


def _four_bit_head(case: _Case) -> Iterator[_Case]:
    """A checkpoint whose head is quantized too; one that the embedding lends would need memory of its own."""
    is_plain = any(linear.role == HEAD and linear.parts[0].bits is None for linear in case.model.linears)
    if is_plain and not case.model.tied:
        yield case.then("a checkpoint with a 4-bit lm_head", model=_with(case.model, HEAD, bits=4, group=_USUAL_GROUP))


def _other_weights(case: _Case) -> Iterator[_Case]:
    """The same model in 4 bits, or with other groups."""
    if case.model.bits is None:
        yield case.then("a 4-bit checkpoint (group 128)", model=_with(case.model, None, bits=4, group=_USUAL_GROUP))
        return
    if case.model.bits == 8:
        yield case.then("a 4-bit checkpoint (group 128)", model=_with(case.model, None, bits=4, group=_USUAL_GROUP))
    for size in _GROUP_SIZES:
        if size != case.model.group_size and case.model.quantization != "gguf":
            words = "one group per channel" if size == -1 else f"groups of {size}"
            changed = _with(case.model, None, bits=None, group=size)
            yield case.then(f"a checkpoint with {words}", model=changed)


def _with(model: ModelFacts, role: str | None, *, bits: int | None, group: int) -> ModelFacts:
    """The model with other bits or groups: of one role, or (None) of all linears but the head."""

    def change(part: WeightFacts) -> WeightFacts:
        if bits is None and part.bits is None:
            return part
        if bits is not None:
            middle = 2 ** (bits - 1) if part.bits is None else part.zero_const
            part = replace(part, bits=bits, zero_const=middle)
        return replace(part, group_size=part.in_features if group == -1 else group)

    def changed(linear: MergedFacts) -> MergedFacts:
        is_meant = linear.role == role if role is not None else linear.role != HEAD
        return replace(linear, parts=tuple(map(change, linear.parts))) if is_meant else linear

    others = model.other_downs if role is not None else tuple(map(change, model.other_downs))
    stages = tuple(_with(stage, role, bits=bits, group=group) for stage in model.stages)
    return replace(model, linears=tuple(map(changed, model.linears)), other_downs=others, stages=stages)


def _more_cards(case: _Case) -> Iterator[_Case]:
    cards = case.machine.cards
    limit = case.config.cache.gpu_memory_limit
    if not case.machine.is_gpu or len(set(cards)) > 1 or isinstance(limit, tuple):
        return
    ranks, num_stages = 2 * len(cards), max(1, len(case.model.stages))
    while ranks <= _MOST_RANKS:
        machine = replace(case.machine, cards=cards[:1] * ranks)
        yield case.then(f"-tp {ranks // num_stages} (with {ranks} such cards)", machine=machine)
        ranks *= 2


#: All but more cards, the least painful first; each tells which requests it makes of one.
_CHANGES: tuple[Callable[[_Case], Iterator[_Case]], ...] = (
    _own_cache_size,
    _smaller_numbers,
    _fewer_sequences,
    _shorter_steps,
    _more_of_the_card,
    _no_graphs,
    _four_bit_head,
    _other_weights,
)
