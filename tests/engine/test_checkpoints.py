"""Six checkpoints of three public quantizers give the tokens and log-probabilities computed independently of us.

In float32: equal tokens, log-probabilities within 1e-3, whatever else runs in the batch, with and without the prefix
cache, in one chunk or in many. In bfloat16: within 0.1 for as long as the tokens agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from qengine import LLM, SamplingParams
from qengine.request import RequestOutput
from quant_kernels.linear import dispatch
from tests.engine.fixtures import NAMES, Expected, expected, path

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, logprobs=0, ignore_eos=True)


def test_all_six_are_here() -> None:
    assert len(NAMES) == 6


def check(outputs: Sequence[RequestOutput], wanted: Sequence[Expected]) -> None:
    assert len(outputs) == len(wanted)
    for output, want in zip(outputs, wanted, strict=True):
        choice = output.outputs[0]
        assert output.prompt_token_ids == want.prompt_token_ids
        assert choice.token_ids == want.greedy_token_ids
        assert choice.text == want.text
        assert choice.logprobs is not None
        for token, position, logprob in zip(choice.token_ids, choice.logprobs, want.logprobs, strict=True):
            assert abs(position[token].logprob - logprob) < 1e-3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"enable_prefix_caching": False}, id="no prefix cache"),
        pytest.param({"max_num_batched_tokens": 3, "block_size": 4}, id="chunked"),
        pytest.param({"max_num_seqs": 1}, id="one at a time"),
    ],
)
def test_float32_matches(name: str, options: dict[str, Any]) -> None:
    wanted = expected(name)
    with LLM(path(name), dtype="float32", max_model_len=256, **options) as llm:
        for want in wanted:
            check(llm.generate(want.prompt, GREEDY, use_tqdm=False), [want])
        check(llm.generate([w.prompt for w in wanted], GREEDY, use_tqdm=False), wanted)
        again = llm.generate([w.prompt_token_ids for w in wanted], GREEDY, use_tqdm=False)
        check(again, wanted)
        filler = [[(7 * i + j) % 2000 + 3 for j in range(5 + 9 * i)] for i in range(6)]
        mixed = [*filler[:3], *(w.prompt_token_ids for w in wanted), *filler[3:]]
        check(llm.generate(mixed, GREEDY, use_tqdm=False)[3:6], wanted)
        llm.engine.check_integrity()
        assert llm.engine.num_free_blocks == llm.engine.info.num_blocks


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_close_while_tokens_agree(name: str) -> None:
    wanted = expected(name)
    num_compared = 0
    with LLM(path(name), dtype="bfloat16", max_model_len=256) as llm:
        for output, want in zip(llm.generate([w.prompt for w in wanted], GREEDY, use_tqdm=False), wanted, strict=True):
            choice = output.outputs[0]
            assert choice.logprobs is not None
            for token, position, wanted_token, logprob in zip(
                choice.token_ids, choice.logprobs, want.greedy_token_ids, want.logprobs, strict=True
            ):
                if token != wanted_token:
                    break
                assert abs(position[token].logprob - logprob) < 0.1
                num_compared += 1
    assert num_compared >= 24


@pytest.mark.parametrize("has_library", [True, False])
@pytest.mark.parametrize("name", ["llama-gptq-sym-g128", "llama-awq-g64"])
def test_bfloat16_runs_on_the_cpus_kernels(name: str, has_library: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours where they were built, torch's elsewhere."""
    if not has_library:
        monkeypatch.setattr(dispatch, "checked_library", lambda: None)
    expected_kernel = "cpu_int4" if dispatch.checked_library() is None else "cpu_int8"
    with LLM(path(name), dtype="bfloat16", max_model_len=64) as llm:
        model = llm.engine._executor.runner.model  # type: ignore[attr-defined]
        kernels = [part.kernel for linear in model.linears() for part in linear.parts]
        assert kernels.count(expected_kernel) == 4 * model.config.num_layers
        assert kernels.count("dense") == 1
        assert llm.generate("Once", SamplingParams(max_tokens=2), use_tqdm=False)[0].outputs[0].token_ids
