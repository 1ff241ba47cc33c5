"""Structured output through the Python API on a small checkpoint: every answer has its form, whatever is around it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from qengine import LLM, SamplingParams, StructuredOutputs
from qengine.errors import RequestError
from tests.engine.fixtures import path
from tests.grammars.schemas import SCHEMAS

PROMPTS = [f"The {word} statement" for word in ("class", "if", "with", "for", "try", "while")]
CODE = SCHEMAS["pattern"]
#: Long enough to need several blocks, and bound to end.
DIGITS = "[0-9]{70,80}"


@pytest.fixture(scope="module")
def crowded() -> Iterator[LLM]:
    """An engine whose cache is too small for what it is asked at once."""
    options: dict[str, Any] = {"dtype": "float32", "max_model_len": 128, "kv_cache_memory_bytes": "448KiB"}
    with LLM(path("llama-awq-g64"), **options) as engine:
        yield engine


def params(**more: Any) -> SamplingParams:
    form = more.pop("form", {"json": CODE})
    options = {"temperature": 1.0, "seed": 5, "max_tokens": 90, "structured_outputs": StructuredOutputs(**form), **more}
    return SamplingParams(**options)


def texts(llm: LLM, prompts: list[str], sampling: SamplingParams) -> list[list[str]]:
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    assert all(choice.finish_reason == "stop" for output in outputs for choice in output.outputs)
    return [[choice.text for choice in output.outputs] for output in outputs]


def test_answers_keep_their_form_under_preemption_and_are_those_of_each_alone(crowded: LLM) -> None:
    sampling = params(n=2, form={"regex": DIGITS})
    before = crowded.engine.scheduler.stats.num_preemptions
    together = texts(crowded, PROMPTS, sampling)
    assert crowded.engine.scheduler.stats.num_preemptions > before
    for choices in together:
        assert all(re.fullmatch(DIGITS, text) for text in choices)
        assert choices[0] != choices[1]
    assert together == [texts(crowded, [prompt], sampling)[0] for prompt in PROMPTS]
    assert crowded.engine.num_free_blocks == crowded.engine.info.num_blocks


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"regex": "[a-z]{2,9}!"}, "[a-z]{2,9}!"),
        ({"choice": ["yes", "no, never"]}, "yes|no, never"),
        ({"grammar": 'root ::= "(" [0-9]+ ")"'}, r"\([0-9]+\)"),
        ({"grammar": "start: /[xy]{3}/"}, "[xy]{3}"),
    ],
    ids=str,
)
def test_every_kind_of_form(llm: LLM, form: dict[str, Any], pattern: str) -> None:
    for choices in texts(llm, PROMPTS[:3], params(form=form)):
        assert re.fullmatch(pattern, choices[0])


def test_forms_and_free_text_share_a_step(llm: LLM) -> None:
    free = SamplingParams(temperature=0, max_tokens=12)
    mixed = llm.generate(PROMPTS[:2], [free, params(temperature=0)], use_tqdm=False)
    alone = llm.generate(PROMPTS[:1], free, use_tqdm=False)
    assert mixed[0].outputs[0].text == alone[0].outputs[0].text
    jsonschema.validate(json.loads(mixed[1].outputs[0].text), CODE)


def test_penalties_and_bias_act_within_the_form(llm: LLM) -> None:
    (no,) = llm.engine.tokenizer.encode("n", add_special_tokens=False)
    form = {"choice": ["nnnn", "yyyy"]}
    biased = params(form=form, temperature=0, logit_bias={no: -100.0})
    assert texts(llm, PROMPTS[:1], biased)[0][0] == "yyyy"
    assert texts(llm, PROMPTS[:1], params(form=form, repetition_penalty=2.0, min_p=0.1, top_k=5))


def test_what_cannot_be_is_refused_and_leaves_nothing(llm: LLM) -> None:
    with pytest.raises(RequestError, match="grammar"):
        llm.generate(PROMPTS, params(form={"regex": "((("}), use_tqdm=False)
    with pytest.raises(RequestError, match="exclude each other"):
        llm.generate(PROMPTS, params(allowed_token_ids=[1, 2]), use_tqdm=False)
    with pytest.raises(RequestError, match="exactly one"):
        StructuredOutputs(regex="a", choice=["b"])
