"""The sampler: each filter against its definition, the order of operations, and what a seed promises."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from qengine.request import SamplingParams
from qengine.runtime.sampler import Choose, Sampler, make_sampler, uniform
from qengine.runtime.sampling import torch_choice
from qengine.runtime.sampling.history import Histories
from qengine.runtime.sampling.settings import RowSettings
from qengine.scheduling.batch import SampledToken, SampleSpec
from quant_kernels.late import try_import
from quant_kernels.sampling import reference

# numpy in Triton's interpreter; the kernel looks for what comes of it.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")
VOCAB = 50


def spec(seed: int = 0, output: tuple[int, ...] = (), prompt: tuple[int, ...] = (1,), **params: Any) -> SampleSpec:
    return SampleSpec(SamplingParams(**params), seed, prompt, output, frozenset({VOCAB - 1}))


def some_logits(rows: int = 1, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def sample(logits: torch.Tensor, specs: Sequence[SampleSpec]) -> list[SampledToken]:
    """One token per row; the rows must have some."""
    found = make_sampler(on_triton=False).begin(logits, specs).finish()
    assert None not in found
    return [token for token in found if token is not None]


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


@pytest.mark.parametrize("other", [0.0, -200.0, -math.inf, math.nan])
def test_a_weight_is_zero_where_it_is_no_normal_number_whatever_the_others_are(other: float) -> None:
    exponents = torch.tensor([[0.0, -1.0, -86.0, -95.0, -120.0, -math.inf], [other] * 6])
    weights = torch_choice._exp(exponents.clone())
    assert torch.equal(weights[0, :3], exponents[0, :3].exp())
    assert weights[0, 3:].tolist() == [0.0, 0.0, 0.0]


def test_ties_do_not_make_a_row_depend_on_its_neighbours() -> None:
    """Many equal logits, as in 16-bit arithmetic: a neighbour that needs a full sort must not reorder the ties."""
    tied = (torch.randn(1, 3000, generator=torch.Generator().manual_seed(2)) * 2).round()
    flat = torch.zeros(1, 3000)
    for seed in range(50):
        mine, other = spec(seed=seed, top_k=40, top_p=0.9), spec(seed=seed, top_p=0.99)
        alone = sample(tied.clone(), [mine])[0].token_id
        together = sample(torch.cat([flat, tied]), [other, mine])[1].token_id
        assert alone == together


# Both ways of choosing, behind the interface that the runner uses.


def choosers() -> dict[str, Choose]:
    module = try_import("qengine.runtime.sampling.triton_choice")
    return {"torch": torch_choice.choose, **({} if module is None else {"triton": module.choose})}


@pytest.fixture(params=["torch", "triton"])
def sampler(request: pytest.FixtureRequest) -> Sampler:
    """Each kind of sampler, the kernel in Triton's interpreter."""
    if request.param not in choosers():
        pytest.skip("needs triton")
    return Sampler(choosers()[request.param])


#: Everything that a request can ask for, alone and together.
ASKED: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 9},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"temperature": 1.4, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    {"repetition_penalty": 1.5},
    {"presence_penalty": 1.0, "frequency_penalty": -0.5, "top_p": 0.95},
    {"logit_bias": {7: 3.0, 9: -100.0}, "logprobs": 2},
    {"allowed_token_ids": [3, 9, 11], "logit_bias": {3: 2.0}},
    {"temperature": 0.0, "repetition_penalty": 2.0, "presence_penalty": 0.5, "logprobs": 0},
    {"min_tokens": 8, "max_tokens": 9, "stop_token_ids": [1, 2], "top_k": 30},
]


def asked_specs(times: int = 2) -> list[SampleSpec]:
    return [spec(seed=i, prompt=(1, 5, 9), output=(4, 4, 6), **p) for i, p in enumerate(ASKED * times)]


def test_both_ways_of_choosing_agree() -> None:
    specs, logits = asked_specs(), some_logits(2 * len(ASKED), seed=3)
    first, *others = (Sampler(choose).begin(logits.clone(), specs).finish() for choose in choosers().values())
    assert len({token.token_id for token in first if token is not None}) > 8
    for other in others:
        assert other == first


def test_edits_of_all_rows_at_once_are_those_of_each_alone() -> None:
    specs, logits = asked_specs(1), some_logits(len(ASKED), seed=3)
    together = logits.clone()
    Sampler(torch_choice.choose).begin(together, specs)
    for row, one in enumerate(specs):
        alone = logits[row : row + 1].clone()
        Sampler(torch_choice.choose).begin(alone, [one])
        assert torch.equal(together[row], alone[0])
    assert torch.equal(together[:6], logits[:6])
    assert not torch.equal(together[6:], logits[6:])


def packed(token_ids: Sequence[int], vocab: int = VOCAB) -> bytes:
    """The words of a grammar that allows these tokens."""
    words = [0] * -(-vocab // 32)
    for token_id in token_ids:
        words[token_id // 32] |= 1 << token_id % 32
    return b"".join(word.to_bytes(4, "little") for word in words)


@pytest.mark.parametrize("rows", [[1], [0, 2], list(range(len(ASKED)))], ids=str)
def test_a_grammars_mask_is_a_list_of_allowed_tokens(sampler: Sampler, rows: list[int]) -> None:
    """Held against allowed_token_ids, which takes another way; raw log-probabilities and neighbours are unaffected."""
    asked = [{name: value for name, value in p.items() if name != "allowed_token_ids"} for p in ASKED]
    choices = [[3, 9, 31, 32, 40], [0, VOCAB - 2], [7], [1, 30, 33], list(range(VOCAB))] * 2
    masks = {row: packed(choices[row % len(choices)]) for row in rows}
    specs = [spec(seed=row, output=(4, 4, 6), **{**p, "min_tokens": 0}) for row, p in enumerate(asked)]
    listed = [
        spec(
            seed=row,
            output=(4, 4, 6),
            **{**p, "min_tokens": 0, **({"allowed_token_ids": choices[row % len(choices)]} if row in masks else {})},
        )
        for row, p in enumerate(asked)
    ]
    logits = some_logits(len(asked), seed=6)
    found = sampler.begin(logits.clone(), specs, [masks.get(row) for row in range(len(asked))]).finish()
    assert found == sampler.begin(logits.clone(), listed).finish()
    assert all(found[row].token_id in choices[row % len(choices)] for row in rows)  # type: ignore[union-attr]


def test_a_grammar_decides_when_the_end_may_come(sampler: Sampler) -> None:
    """min_tokens bans the end, but not where a grammar allows nothing else: then it knows better."""
    too_short = spec(temperature=0.0, min_tokens=5)
    assert sampler.begin(some_logits(), [too_short], [packed([VOCAB - 1])]).finish() == [SampledToken(VOCAB - 1)]


def test_a_row_that_is_not_finite_fails_alone(sampler: Sampler) -> None:
    logits = some_logits().repeat(7, 1)
    logits[0, 7], logits[2, 7], logits[3, :] = torch.nan, torch.inf, -torch.inf
    params: list[dict[str, Any]] = [{}, {"top_p": 0.9}, {"top_k": 4}, {}, {"temperature": 0.0}, {}, {"top_k": 4}]
    specs = [spec(seed=1, logprobs=1, **p) for p in params]
    nothing_left = spec(temperature=0.0, allowed_token_ids=[3], min_tokens=1, stop_token_ids=[3])
    specs[5] = nothing_left
    found = sampler.begin(logits, specs).finish()
    assert [token is None for token in found] == [True, False, True, True, False, True, False]
    assert found[6] == sampler.begin(some_logits(), [specs[6]]).finish()[0]


def test_a_greedy_row_of_nan_fails_too(sampler: Sampler) -> None:
    logits = some_logits().repeat(2, 1)
    logits[0, 7] = torch.nan
    found = sampler.begin(logits, [spec(temperature=0.0)] * 2).finish()
    assert found == [None, SampledToken(int(logits[1].argmax()))]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_in_16_bits(sampler: Sampler, dtype: torch.dtype) -> None:
    specs, logits = asked_specs(1), some_logits(len(ASKED), seed=4).to(dtype)
    kept = logits.clone()
    found = sampler.begin(logits, specs).finish()
    assert found == Sampler(torch_choice.choose).begin(kept.float(), specs).finish()
    assert torch.equal(logits, kept)


def test_the_draw_goes_in_the_order_of_ids() -> None:
    logits = torch.tensor([[1.0, 3.0, 0.0, 2.0, 3.0]])
    for params, kept in [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 3}, [1, 3, 4]),
        ({"top_k": 1}, [1]),
        ({"top_p": 0.7}, [1, 4]),
    ]:
        seen = [
            (uniform(seed, 1), sample(logits.clone(), [spec(seed=seed, **params)])[0].token_id) for seed in range(60)
        ]
        drawn = [token for _, token in sorted(seen)]
        assert drawn == sorted(drawn)
        assert set(drawn) == set(kept)


@pytest.mark.parametrize(
    "params", [{"top_k": 300}, {"top_k": 40}, {"top_p": 0.4}, {"top_k": 2000, "top_p": 0.7}], ids=str
)
def test_ties_go_to_the_lowest_ids_in_a_large_vocabulary(params: dict[str, Any]) -> None:
    """Where the candidates end within a tie, and where they do not hold the set."""
    logits = torch.randint(0, 3, (1, 3000), generator=torch.Generator().manual_seed(5)).float()
    settings = (1.0, 0.0, params.get("top_k", 0), params.get("top_p", 1.0))
    for seed in range(40):
        expected = reference.sample(logits[0], *settings, uniform(seed, 1))
        assert sample(logits.clone(), [spec(seed=seed, **params)])[0].token_id == expected


def test_histories_follow_their_sequences() -> None:
    """Counted as they grow, in any row; a new sequence in the place of an old one is counted afresh."""
    histories, prompt = Histories(), [1, 2, 2]
    first, second = [4], [7, 7]

    def counts(*outputs: list[int]) -> list[dict[int, float]]:
        specs = [SampleSpec(SamplingParams(presence_penalty=1.0), 0, prompt, o, frozenset()) for o in outputs]
        found = [h for h in histories.of(specs) if h is not None]
        assert all(h.prompt_ids.tolist() == [1, 2] for h in found)
        return [dict(zip(h.output_ids.tolist(), h.times.tolist(), strict=True)) for h in found]

    assert counts(first, second) == [{4: 1}, {7: 2}]
    first.append(4)
    second.append(5)
    assert counts(second, first) == [{7: 2, 5: 1}, {4: 2}]
    assert counts(first) == [{4: 2}]
    assert counts([4], second) == [{4: 1}, {7: 2, 5: 1}]
    assert histories.of([spec(output=(4,))]) == [None]


def test_begin_reads_nothing_back() -> None:
    """On the meta device nothing has a value, so anything that waits for one raises."""
    seen: list[torch.Tensor] = []

    def choose(logits: torch.Tensor, settings: RowSettings) -> torch.Tensor:
        seen.append(logits)
        return torch.empty(len(settings.temperature), dtype=torch.int32, device=logits.device)

    specs = asked_specs(1)
    pending = Sampler(choose).begin(torch.empty(len(specs), VOCAB, device="meta"), specs)
    assert pending.token_ids.shape == (len(specs),)
    assert seen[0].device.type == "meta"
    with pytest.raises((RuntimeError, NotImplementedError)):
        pending.finish()


def test_the_factory_uses_torch_where_there_is_no_gpu() -> None:
    found = make_sampler(on_triton=False).begin(some_logits(), [spec(temperature=0.0)]).finish()
    assert found == [SampledToken(int(some_logits().argmax()))]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_begin_does_not_wait_for_the_device() -> None:
    """At real sizes, with CUDA told to complain about anything that synchronizes."""
    device, count = torch.device("cuda"), 4 * len(ASKED)
    logits = (torch.randn(count, 128256, generator=torch.Generator().manual_seed(1)) * 2).to(device)
    specs, sampler = asked_specs(4), make_sampler(on_triton=True)
    expected = Sampler(torch_choice.choose).begin(logits.cpu(), specs).finish()
    sampler.begin(logits.clone(), specs).finish()
    copy = logits.clone()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = sampler.begin(copy, specs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = pending.finish()
    same = sum(
        a is not None and b is not None and a.token_id == b.token_id for a, b in zip(found, expected, strict=True)
    )
    # Rounding may move a boundary past a random number.
    assert same >= count - 2
