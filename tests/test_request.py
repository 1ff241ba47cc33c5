"""SamplingParams refuses what it cannot honour, and a Request's arithmetic holds."""

from __future__ import annotations

import math
from typing import Any

import pytest

from qengine.errors import RequestError
from qengine.request import Request, SamplingParams


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("n", [0, -1, 1.5, True, "2"]),
        ("max_tokens", [0, -1, 1.5, "10", True]),
        ("min_tokens", [-1, 17, 0.5]),
        ("temperature", [-0.1, 1e300, math.nan, math.inf, "hot"]),
        ("top_p", [0, -1, 1.0001, math.nan]),
        ("top_k", [-2, 1.5, "5"]),
        ("min_p", [-0.1, 2, math.nan]),
        ("presence_penalty", [2.01, -2.01, math.nan]),
        ("frequency_penalty", [2.01, -2.01, math.inf]),
        ("repetition_penalty", [0, -1, 1e-300, 1e300, math.nan]),
        ("seed", [-1, 2**63, "a", 1.0]),
        ("logprobs", [-1, 1.5]),
        ("prompt_logprobs", [-1, True]),
        ("stop", [[""], [3], 5, {"a": 1}]),
        ("stop_token_ids", [[-1], [1.5], ["x"], 5, "12"]),
        ("allowed_token_ids", [[], [-3], 5]),
        ("logit_bias", [[1], {-1: 1.0}, {1: 101}, {1: math.nan}, {"a": 1.0}]),
    ],
)
def test_bad_values_name_their_field(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(RequestError, match=field) as caught:
            SamplingParams(**{field: value})
        assert caught.value.param == field


def test_edges_are_accepted() -> None:
    params = SamplingParams(
        n=8, top_k=-1, top_p=1, temperature=0, min_p=1.0, max_tokens=None, seed=2**63 - 1, logprobs=0, stop="end"
    )
    assert params.stop_strings == ("end",)
    assert params.is_greedy
    assert SamplingParams(temperature=1e-320).is_greedy
    assert not SamplingParams(temperature=1e-4).is_greedy


def test_a_long_value_is_shortened_in_the_message() -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(temperature="x" * 10_000)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 300


def test_tokens_between_spans_prompt_and_output() -> None:
    request = Request("r", [1, 2, 3], SamplingParams(), output_token_ids=[4, 5])
    assert request.num_tokens == 5
    assert [request.tokens_between(a, b) for a, b in [(0, 2), (1, 4), (3, 5), (2, 2)]] == [
        (1, 2),
        (2, 3, 4),
        (4, 5),
        (),
    ]
