"""Grammars in the scheduler: told every token once, asked only when a token is sampled, failing alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from qengine.errors import GrammarError
from qengine.request import Request
from qengine.scheduling.batch import SampledToken, StepResult
from qengine.scheduling.scheduler import Scheduler
from tests.scheduling.fake_runner import make_request
from tests.scheduling.test_scheduler import make_scheduler


@dataclass
class Counting:
    """Allows what names how many tokens it was told; `breaks_at` is the token that it cannot take."""

    told: list[int] = field(default_factory=list)
    length: int = 10**9
    breaks_at: int = 10**9

    @property
    def allowed(self) -> bytes:
        return len(self.told).to_bytes(4, "little")

    @property
    def is_complete(self) -> bool:
        return len(self.told) >= self.length

    def accept(self, token_id: int) -> None:
        self.told.append(token_id)
        if len(self.told) > self.breaks_at:
            raise GrammarError("it broke")


def with_grammar(request: Request, grammar: Counting) -> Request:
    request.grammar = grammar
    return request


def run(scheduler: Scheduler, *requests: Request) -> None:
    """Step to the end; token n of a request is n, and each entry must carry what its grammar says at that time."""
    known = {request.request_id: request for request in requests}
    for request in requests:
        scheduler.add(request)
    while scheduler.has_unfinished:
        batch = scheduler.schedule()
        for entry in batch.entries:
            request = known[entry.request_id]
            expected = request.grammar.allowed if request.grammar is not None and entry.sample is not None else None
            assert entry.allowed == expected
        sampled = {
            entry.request_id: SampledToken(len(known[entry.request_id].output_token_ids))
            for entry in batch.entries
            if entry.sample is not None
        }
        scheduler.update(batch, StepResult(sampled))
        scheduler.check_integrity()


def test_a_long_prompt_is_computed_before_the_grammar_is_asked() -> None:
    grammar = Counting()
    request = with_grammar(make_request("a", range(70), max_tokens=3, eos=[99]), grammar)
    run(make_scheduler(), request)
    assert grammar.told == request.output_token_ids == [0, 1, 2]
    assert request.finish_reason == "length"


@pytest.mark.parametrize("more", [{}, {"ignore_eos": True}, {"min_tokens": 9}], ids=str)
def test_a_complete_grammar_ends_the_answer(more: dict[str, object]) -> None:
    request = with_grammar(make_request("a", [1, 2], max_tokens=9, eos=[3], **more), Counting(length=4))
    run(make_scheduler(), request)
    assert request.output_token_ids == [0, 1, 2, 3]
    assert (request.finish_reason, request.stop_reason) == ("stop", None)


def test_a_grammar_survives_preemption() -> None:
    requests = [
        with_grammar(make_request(name, [i] * 4, max_tokens=24, eos=[99]), Counting()) for i, name in enumerate("abcd")
    ]
    scheduler = make_scheduler(num_blocks=10)
    run(scheduler, *requests)
    assert scheduler.stats.num_preemptions
    for request in requests:
        assert isinstance(request.grammar, Counting)
        assert request.grammar.told == request.output_token_ids == list(range(24))


def test_a_grammar_that_breaks_fails_its_request_alone() -> None:
    broken = with_grammar(make_request("a", [1, 2], max_tokens=9, eos=[99]), Counting(breaks_at=3))
    others = [with_grammar(make_request("b", [1, 2], max_tokens=9), Counting()), make_request("c", [1], max_tokens=9)]
    scheduler = make_scheduler()
    run(scheduler, broken, *others)
    assert (broken.finish_reason, broken.error) == ("error", "it broke")
    assert [request.finish_reason for request in others] == ["length", "length"]
    assert all(request.output_token_ids == list(range(9)) for request in others)
    assert scheduler.pool.num_free == scheduler.pool.num_blocks
