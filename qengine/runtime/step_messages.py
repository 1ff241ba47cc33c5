"""From a Batch to a Step message and back, and the same for results.

A step names only what has changed since the last one: a decoding sequence of thousands of tokens costs a few bytes. The
engine's `StepWriter` knows what every rank knows, and each rank's `StepReader` keeps it. Invariant: a batch that was
written and read, in order, is equal in all that a runner looks at; request ids stay with the engine, and a rank has its
own for as long as it knows a sequence.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qengine.runtime.channel import ProtocolError
from qengine.runtime.messages import NO_TOKEN, Entry, Result, Sampling, Step
from qengine.scheduling.batch import Batch, BatchEntry, SampledToken, SampleSpec, StepResult


@dataclass(slots=True)
class _Sent:
    """What the ranks know of one sequence."""

    slot: int
    table: tuple[int, ...] = ()
    sample: SampleSpec | None = None
    num_outputs: int = 0


class StepWriter:
    """Writes steps for readers that get all of them.

    Args:
        capacity: sequences remembered, those in use last; at least as many as are in one step.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._sent: OrderedDict[str, _Sent] = OrderedDict()

    def write(self, batch: Batch) -> Step:
        """The message for a batch."""
        return Step(tuple([self._entry(entry) for entry in batch.entries]))

    def _entry(self, entry: BatchEntry) -> Entry:
        sent = self._sent.get(entry.request_id)
        is_new = sent is None
        if sent is None:
            sent = self._open(entry.request_id)
        else:
            self._sent.move_to_end(entry.request_id)
        num_kept = _num_kept(sent.table, entry.block_ids)
        sent.table = entry.block_ids
        sampling, output_ids = self._sampling(sent, entry.sample) if entry.sample is not None else (None, ())
        return Entry(
            sent.slot,
            is_new,
            entry.start,
            entry.token_ids,
            num_kept,
            entry.block_ids[num_kept:],
            entry.sample is not None,
            sampling,
            output_ids,
            entry.num_prompt_logprobs,
            entry.prompt_targets,
            entry.allowed,
            entry.pool,
        )

    def _open(self, request_id: str) -> _Sent:
        """A slot for a sequence, if need be that of the one that was not needed for longest."""
        slot = len(self._sent)
        if slot >= self._capacity:
            _, oldest = self._sent.popitem(last=False)
            slot = oldest.slot
        sent = self._sent[request_id] = _Sent(slot)
        return sent

    def _sampling(self, sent: _Sent, spec: SampleSpec) -> tuple[Sampling | None, tuple[int, ...]]:
        sampling = None
        if sent.sample is not spec:
            # Another request of the same name has a spec of its own.
            sent.sample, sent.num_outputs = spec, 0
            # What grammars allow comes with each step; ranks do not know the grammar.
            params = replace(spec.params, structured_outputs=None)
            sampling = Sampling(params, spec.seed, tuple(spec.prompt_token_ids), tuple(spec.eos_token_ids))
        output_ids = tuple(spec.output_token_ids[sent.num_outputs :])
        sent.num_outputs += len(output_ids)
        return sampling, output_ids


def _num_kept(old: tuple[int, ...], new: tuple[int, ...]) -> int:
    """How many leading blocks need not be sent: all of the old table, if the new one goes on from it."""
    return len(old) if new is old or new[: len(old)] == old else 0


@dataclass(slots=True)
class _Known:
    """A sequence as a rank knows it. `outputs` is the list of `sample`, and grows with what arrives."""

    request_id: str
    table: tuple[int, ...]
    sample: SampleSpec | None
    outputs: list[int]


class StepReader:
    """Reads the steps of one writer, all of them and in order."""

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}
        self._ids = itertools.count()

    def read(self, step: Step) -> Batch:
        """The batch of a message.

        Raises:
            ProtocolError: it speaks of what was never sent.
        """
        return Batch(tuple([self._entry(entry) for entry in step.entries]))

    def _entry(self, entry: Entry) -> BatchEntry:
        known = self._known.get(entry.slot)
        if entry.is_new:
            known = self._known[entry.slot] = _Known(str(next(self._ids)), (), None, [])
        if known is None or entry.num_kept_blocks > len(known.table):
            raise ProtocolError(f"a step goes on with sequence {entry.slot}, of which not so much is known")
        if entry.block_ids or entry.num_kept_blocks != len(known.table):
            known.table = known.table[: entry.num_kept_blocks] + entry.block_ids
        return BatchEntry(
            known.request_id,
            entry.token_ids,
            entry.start,
            known.table,
            self._sample(known, entry) if entry.samples else None,
            entry.num_prompt_logprobs,
            entry.prompt_targets,
            entry.allowed,
            entry.pool,
        )

    def _sample(self, known: _Known, entry: Entry) -> SampleSpec:
        if entry.sampling is not None:
            said = entry.sampling
            known.outputs = []
            known.sample = SampleSpec(
                said.params, said.seed, said.prompt_token_ids, known.outputs, frozenset(said.eos_token_ids)
            )
        if known.sample is None:
            raise ProtocolError(f"a step samples sequence {entry.slot}, of which it was not said how")
        known.outputs.extend(entry.output_ids)
        return known.sample


# Results


def write_result(batch: Batch, result: StepResult) -> Result:
    """The message for what a rank computed of a batch with its own ids."""
    sampling = [entry.request_id for entry in batch.entries if entry.sample is not None]
    tokens = [result.sampled.get(request_id) for request_id in sampling]
    logprobs = [None if token is None else token.logprobs for token in tokens]
    places = {entry.request_id: place for place, entry in enumerate(batch.entries)}
    return Result(
        tuple([NO_TOKEN if token is None else token.token_id for token in tokens]),
        tuple(logprobs) if any(logprob is not None for logprob in logprobs) else (),
        {places[request_id]: tuple(records) for request_id, records in result.prompt_logprobs.items()},
        {places[request_id]: reason for request_id, reason in result.failed.items()},
        {places[request_id]: vector for request_id, vector in result.pooled.items()},
    )


def read_result(batch: Batch, message: Result) -> StepResult:
    """The answers for a batch with the engine's ids.

    Raises:
        ProtocolError: they are not those of this batch.
    """
    entries = batch.entries
    sampling = [entry for entry in entries if entry.sample is not None]
    if len(message.token_ids) != len(sampling) or len(message.logprobs) not in (0, len(sampling)):
        raise ProtocolError(f"{len(message.token_ids)} tokens for {len(sampling)} sequences that sample")
    places = [*message.failed, *message.prompt_logprobs, *message.pooled]
    if any(place >= len(entries) for place in places):
        raise ProtocolError(f"a result speaks of sequence {max(places)} of {len(entries)}")
    logprobs = message.logprobs or (None,) * len(sampling)
    failed = {entries[place].request_id: reason for place, reason in message.failed.items()}
    sampled = {
        entry.request_id: SampledToken(token_id, logprob)
        for entry, token_id, logprob in zip(sampling, message.token_ids, logprobs, strict=True)
        if token_id != NO_TOKEN
    }
    prompt_logprobs = {entries[place].request_id: records for place, records in message.prompt_logprobs.items()}
    pooled = {entries[place].request_id: vector for place, vector in message.pooled.items()}
    result = StepResult(sampled, prompt_logprobs, failed, pooled)
    _check_complete(entries, result)
    return result


def _check_complete(entries: Sequence[BatchEntry], result: StepResult) -> None:
    for entry in entries:
        if entry.request_id in result.failed:
            continue
        if entry.sample is not None and entry.request_id not in result.sampled:
            raise ProtocolError("a sequence has neither a token nor a reason why there is none")
        if len(result.prompt_logprobs.get(entry.request_id, ())) != len(entry.prompt_targets):
            raise ProtocolError("log-probabilities of a prompt are not those that were asked for")
        vector = result.pooled.get(entry.request_id)
        if (vector is None) != (entry.pool is None) or (vector is not None and (not vector or len(vector) % 4)):
            raise ProtocolError("hidden states are not pooled as they were asked for")
