"""The sampler: each filter against its definition, the order of operations, and what a seed promises."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch

from qengine.request import SamplingParams
from qengine.runtime.sampler import sample, uniform
from qengine.scheduling.batch import SampleSpec

VOCAB = 50


def spec(seed: int = 0, output: tuple[int, ...] = (), prompt: tuple[int, ...] = (1,), **params: Any) -> SampleSpec:
    return SampleSpec(SamplingParams(**params), seed, prompt, output, frozenset({VOCAB - 1}))


def some_logits(rows: int = 1, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def draw(logits: torch.Tensor, times: int, **params: Any) -> Counter[int]:
    """Sample one distribution many times, each with its own seed."""
    rows = logits.expand(times, -1).clone()
    return Counter(t.token_id for t in sample(rows, [spec(seed=i, **params) for i in range(times)]))


def allowed_by_definition(logits: torch.Tensor, top_k: int, top_p: float, min_p: float) -> set[int]:
    """min_p, then top_k, then top_p over what is left, straight from their definitions."""
    probs = torch.softmax(logits.double(), dim=-1).tolist()
    kept = {i: p for i, p in enumerate(probs) if p >= min_p * max(probs)}
    order = sorted(kept, key=lambda i: -kept[i])
    order = order[:top_k] if top_k > 0 else order
    total = sum(kept[i] for i in order)
    result, mass = set(), 0.0
    for i in order:
        if mass >= top_p:
            break
        result.add(i)
        mass += kept[i] / total
    return result


def test_greedy_takes_the_lowest_id_of_a_tie() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [7, 3, 20]] = 5.0
    assert sample(logits, [spec(temperature=0.0)])[0].token_id == 3


def test_tiny_temperature_is_greedy() -> None:
    logits = some_logits()
    assert sample(logits.clone(), [spec(temperature=1e-6)])[0].token_id == int(logits.argmax())


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        (0, 1.0, 0.0),
        (5, 1.0, 0.0),
        (0, 0.7, 0.0),
        (0, 1.0, 0.2),
        (8, 0.6, 0.05),
        (1, 1.0, 0.0),
        (0, 1e-9, 0.0),
        (999, 0.95, 0.0),
    ],
)
def test_filters_keep_exactly_the_defined_set(top_k: int, top_p: float, min_p: float) -> None:
    logits = some_logits()
    seen = draw(logits, 4000, top_k=top_k, top_p=top_p, min_p=min_p)
    allowed = allowed_by_definition(logits[0], top_k, top_p, min_p)
    assert set(seen) <= allowed
    probs = torch.softmax(logits[0], dim=-1)
    kept = {i: float(probs[i]) for i in allowed}
    total = sum(kept.values())
    for token, p in kept.items():
        expected = p / total * 4000
        assert abs(seen[token] - expected) < 6 * math.sqrt(expected) + 6


def test_temperature_changes_the_distribution() -> None:
    logits = some_logits()
    seen = draw(logits, 4000, temperature=0.5)
    probs = torch.softmax(logits[0] / 0.5, dim=-1)
    best = int(probs.argmax())
    assert abs(seen[best] / 4000 - float(probs[best])) < 0.05


def test_a_large_vocabulary_sorts_only_when_it_must() -> None:
    """Flat distributions need more than the first candidates; the set must still be exact."""
    logits = torch.linspace(0.0, 0.2, 3000).unsqueeze(0)
    allowed = allowed_by_definition(logits[0], 0, 0.9, 0.0)
    seen = draw(logits, 3000, top_p=0.9)
    assert set(seen) <= allowed
    assert len(allowed) > 1024
    assert max(2999 - t for t in seen) > 1500


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    logits = some_logits(6, seed=5)
    params: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {"temperature": 0.0},
        {"temperature": 0.8, "top_k": 4},
        {"temperature": 1.3, "top_p": 0.5},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 1.0, "presence_penalty": 1.0, "repetition_penalty": 1.3},
    ]
    specs = [spec(seed=i, output=(3, 4, 4), **p) for i, p in enumerate(params)]
    together = [t.token_id for t in sample(logits.clone(), specs)]
    alone = [sample(logits[i : i + 1].clone(), [specs[i]])[0].token_id for i in range(6)]
    backwards = [t.token_id for t in sample(logits.flip(0).clone(), specs[::-1])][::-1]
    assert together == alone == backwards


def test_random_numbers_are_keyed_by_seed_and_position() -> None:
    assert uniform(1, 2) == uniform(1, 2)
    values = {uniform(seed, position) for seed in range(30) for position in range(30)}
    assert len(values) == 900
    assert all(0 <= v < 1 for v in values)
    assert abs(sum(values) / 900 - 0.5) < 0.05


def test_penalties_follow_their_definitions() -> None:
    logits = some_logits()
    base = logits[0].clone()
    # A bias of equal size on two tokens makes greedy show which one the penalty left ahead.
    for params, token, expected in [
        ({"presence_penalty": 1.5}, 4, base[4] - 1.5),
        ({"frequency_penalty": 0.5}, 4, base[4] - 2 * 0.5),
        ({"repetition_penalty": 2.0}, 9, base[9] / 2 if base[9] > 0 else base[9] * 2),
        ({"repetition_penalty": 2.0}, 4, base[4] / 2 if base[4] > 0 else base[4] * 2),
        ({"presence_penalty": 1.5}, 9, base[9]),
    ]:
        rows = logits.clone()
        sample(rows, [spec(prompt=(9,), output=(4, 4), temperature=0.0, **params)])  # type: ignore[arg-type]
        assert float(rows[0, token]) == pytest.approx(float(expected))


def test_bias_allowed_and_min_tokens() -> None:
    logits = some_logits()
    assert sample(logits.clone(), [spec(temperature=0.0, logit_bias={17: 100.0})])[0].token_id == 17
    allowed = sample(logits.clone(), [spec(temperature=0.0, allowed_token_ids=[5, 6])])[0].token_id
    assert allowed == (5 if logits[0, 5] >= logits[0, 6] else 6)
    eos = logits.clone()
    eos[0, VOCAB - 1] = eos[0, 8] = 50.0
    banned = spec(temperature=0.0, min_tokens=2, max_tokens=5, stop_token_ids=[8], output=(1,))
    assert sample(eos.clone(), [banned])[0].token_id not in (8, VOCAB - 1)
    free = spec(temperature=0.0, min_tokens=2, max_tokens=5, stop_token_ids=[8], output=(1, 2))
    assert sample(eos.clone(), [free])[0].token_id == 8


def test_logprobs_are_raw_and_ranked() -> None:
    logits = some_logits(2)
    raw = torch.log_softmax(logits, dim=-1)
    specs = [spec(temperature=0.3, logit_bias={17: 100.0}, logprobs=3), spec(temperature=0.0)]
    first, second = sample(logits.clone(), specs)
    assert second.logprobs is None
    record = first.logprobs
    assert record is not None
    assert (first.token_id, record.token_id) == (17, 17)
    assert record.logprob == pytest.approx(float(raw[0, 17]))
    assert record.rank == int((raw[0] > raw[0, 17]).sum()) + 1
    values, ids = raw[0].topk(3)
    assert [i for i, _ in record.top] == ids.tolist()
    assert [v for _, v in record.top] == pytest.approx(values.tolist())


def test_ties_do_not_make_a_row_depend_on_its_neighbours() -> None:
    """Many equal logits, as in 16-bit arithmetic: a neighbour that needs a full sort must not reorder the ties."""
    tied = (torch.randn(1, 3000, generator=torch.Generator().manual_seed(2)) * 2).round()
    flat = torch.zeros(1, 3000)
    for seed in range(50):
        mine, other = spec(seed=seed, top_k=40, top_p=0.9), spec(seed=seed, top_p=0.99)
        alone = sample(tied.clone(), [mine])[0].token_id
        together = sample(torch.cat([flat, tied]), [other, mine])[1].token_id
        assert alone == together
