"""Steps as messages: a rank's batch is the engine's, whatever of it was left out, and results find their requests."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from qengine.request import Request, SamplingParams, StructuredOutputs, TokenLogprobs
from qengine.runtime.channel import ProtocolError
from qengine.runtime.messages import Entry, Result, Sampling, Step, decode_order, decode_report, encode
from qengine.runtime.step_messages import StepReader, StepWriter, read_result, write_result
from qengine.scheduling.batch import Batch, BatchEntry, SampledToken, SampleSpec, StepResult
from qengine.scheduling.block_pool import BlockPool
from qengine.scheduling.scheduler import Scheduler, SchedulerLimits
from tests.scheduling.fake_runner import make_request


def travel(step: Step) -> Step:
    """Over the wire."""
    read = decode_order(encode(step))
    assert isinstance(read, Step)
    return read


def content(entry: BatchEntry) -> tuple[Any, ...]:
    """All that a runner looks at, but for the name."""
    spec = entry.sample
    sampling = None
    if spec is not None:
        sampling = (spec.params, spec.seed, spec.eos_token_ids, [*spec.prompt_token_ids], [*spec.output_token_ids])
    rest = (entry.num_prompt_logprobs, entry.prompt_targets, entry.allowed)
    return (entry.token_ids, entry.start, entry.block_ids, sampling, *rest)


def entry_of(request_id: str, blocks: Sequence[int], spec: SampleSpec | None = None, start: int = 0) -> BatchEntry:
    return BatchEntry(request_id, (1, 2), start, tuple(blocks), spec)


def spec_of(outputs: list[int]) -> SampleSpec:
    return SampleSpec(SamplingParams(), 7, [1, 2, 3], outputs, frozenset({5}))


def test_what_a_grammar_allows_comes_with_each_step_and_the_grammar_stays() -> None:
    params = SamplingParams(structured_outputs=StructuredOutputs(regex="a+"))
    spec = SampleSpec(params, 7, [1, 2, 3], [], frozenset({5}))
    writer, reader = StepWriter(4), StepReader()
    for mask in (b"\x01\x80", b"\x02\x00", None):
        batch = Batch((replace(entry_of("a", (1,), spec), allowed=mask),))
        step = writer.write(batch)
        assert b"a+" not in encode(step)
        assert reader.read(travel(step)).entries[0].allowed == mask


@pytest.mark.parametrize("capacity", [8, 30])
def test_a_rank_sees_the_engines_batches(capacity: int) -> None:
    """A crowded scheduler: chunks, preemption, aborts, and more sequences than are remembered."""
    rng = random.Random(3)
    pool = BlockPool(24, 2)
    scheduler = Scheduler(SchedulerLimits(8, 12, 40, max_in_flight=2), pool)
    writer, reader = StepWriter(capacity), StepReader()
    requests: dict[str, Request] = {}
    names: dict[str, str] = {}
    in_flight: list[Batch] = []
    for round_number in range(400):
        while scheduler.num_waiting < 2:
            prompt = [rng.randrange(2) for _ in range(rng.randrange(1, 9))]
            more = {"prompt_logprobs": 1} if rng.random() < 0.2 else {}
            request = make_request(f"r{len(requests)}", prompt, max_tokens=rng.randrange(1, 17), **more)  # type: ignore[arg-type]
            scheduler.add(request)
            requests[request.request_id] = request
        if rng.random() < 0.05:
            scheduler.abort(rng.choice(list(requests)))
        if len(in_flight) < 2:
            batch = scheduler.schedule()
            seen = reader.read(travel(writer.write(batch)))
            assert [content(entry) for entry in seen.entries] == [content(entry) for entry in batch.entries]
            assert len({entry.request_id for entry in seen.entries}) == len(batch.entries)
            for theirs, ours in zip(seen.entries, batch.entries, strict=True):
                assert names.setdefault(theirs.request_id, ours.request_id) == ours.request_id
            in_flight.append(batch)
        if len(in_flight) == 2:
            batch = in_flight.pop(0)
            sampled = {e.request_id: SampledToken(rng.randrange(9)) for e in batch.entries if e.sample is not None}
            logprobs = {
                e.request_id: [TokenLogprobs(t, -1.0, 1) for t in e.prompt_targets]
                for e in batch.entries
                if e.prompt_targets
            }
            scheduler.update(batch, StepResult(sampled, logprobs))
        assert len(reader._known) <= capacity, round_number
    assert scheduler.stats.num_preemptions > 0


def test_what_is_known_is_left_out() -> None:
    writer = StepWriter(8)
    outputs: list[int] = [4]
    spec = spec_of(outputs)
    [first] = writer.write(Batch((entry_of("a", range(100), spec),))).entries
    assert (len(first.block_ids), first.output_ids, first.sampling is not None) == (100, (4,), True)
    outputs.append(6)
    [second] = writer.write(Batch((entry_of("a", range(101), spec),))).entries
    assert (second.num_kept_blocks, second.block_ids, second.output_ids, second.sampling) == (100, (100,), (6,), None)
    assert len(encode(Step((second,)))) < 40


def test_a_new_request_of_an_old_name_is_told_anew() -> None:
    writer, reader = StepWriter(8), StepReader()
    for outputs, blocks in (([4, 5], [1, 2, 3]), ([], [7])):
        batch = Batch((entry_of("a", blocks, spec_of(list(outputs))),))
        [seen] = reader.read(travel(writer.write(batch))).entries
        assert content(seen) == content(batch.entries[0])


def test_lists_of_a_sequence_stay_the_same_objects() -> None:
    """What counts tokens from step to step knows a sequence by them."""
    writer, reader = StepWriter(8), StepReader()
    outputs: list[int] = []
    spec = spec_of(outputs)
    specs = []
    for token in range(3):
        [seen] = reader.read(travel(writer.write(Batch((entry_of("a", [1], spec),))))).entries
        specs.append(seen.sample)
        outputs.append(token)
    assert specs[0] is specs[1] is specs[2]


@pytest.mark.parametrize(
    "entries",
    [
        [Entry(0, False, 0, (1,), 0, (), False)],
        [Entry(0, True, 0, (1,), 1, (), False)],
        [Entry(0, True, 0, (1,), 0, (1, 2), False), Entry(0, False, 0, (1,), 3, (), False)],
        [Entry(0, True, 0, (1,), 0, (1,), True)],
        [
            Entry(0, True, 0, (1,), 0, (1,), True, Sampling(SamplingParams(), 0, (1,), ())),
            Entry(0, True, 0, (1,), 0, (1,), True),
        ],
    ],
)
def test_a_step_about_the_unknown_is_refused(entries: list[Entry]) -> None:
    with pytest.raises(ProtocolError, match="sequence 0"):
        StepReader().read(Step(tuple(entries)))


LOGPROBS = TokenLogprobs(4, -0.5, 1, ((4, -0.5),))


def a_batch() -> Batch:
    """Two that sample, one of which fails, and one part of a prompt whose log-probabilities are wanted."""
    chunk = replace(entry_of("c", [3]), num_prompt_logprobs=1, prompt_targets=(4,))
    return Batch((entry_of("a", [1], spec_of([])), chunk, entry_of("b", [2], spec_of([]))))


def test_results_find_their_requests() -> None:
    batch = a_batch()
    ranks = StepReader().read(travel(StepWriter(8).write(batch)))
    a, c, b = (entry.request_id for entry in ranks.entries)
    result = StepResult({a: SampledToken(4, LOGPROBS)}, {c: [LOGPROBS]}, {b: "NaN"})
    message = decode_report(encode(write_result(ranks, result)))
    assert isinstance(message, Result)
    found = read_result(batch, message)
    assert found.sampled == {"a": SampledToken(4, LOGPROBS)}
    assert found.prompt_logprobs == {"c": (LOGPROBS,)}
    assert found.failed == {"b": "NaN"}


@pytest.mark.parametrize(
    "message",
    [
        Result((4,), (), {1: (LOGPROBS,)}),
        Result((4, 5, 6), (), {1: (LOGPROBS,)}),
        Result((4, 5), (LOGPROBS,), {1: (LOGPROBS,)}),
        Result((4, -1), (), {1: (LOGPROBS,)}),
        Result((4, 5), (), {}),
        Result((4, 5), (), {1: (LOGPROBS, LOGPROBS)}),
        Result((4, 5), (), {3: (LOGPROBS,)}),
        Result((4, -1), (), {1: (LOGPROBS,)}, {9: "NaN"}),
    ],
)
def test_results_of_another_step_are_refused(message: Result) -> None:
    with pytest.raises(ProtocolError):
        read_result(a_batch(), message)
