"""`LLM.embed`: vectors that depend on the text alone, beside generation, through chunks, preemption and ranks.

That they are the model's hidden states is shown in test_bundled, against transformers.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from qengine import LLM
from qengine.errors import EngineDeadError, RequestError
from qengine.request import EmbeddingRequestOutput, Pooling
from tests.engine.fixtures import path
from tests.engine.test_llm import greedy, mixed_prompts, run, tokens

POOLINGS: tuple[Pooling, ...] = ("last", "mean")


def embed(llm: LLM, prompts: Any, **more: Any) -> list[list[float]]:
    return [output.outputs.embedding for output in llm.embed(prompts, use_tqdm=False, **more)]


def close(found: list[list[float]], expected: list[list[float]], limit: float = 2e-5) -> bool:
    return all(math.dist(f, e) <= limit * max(1.0, math.hypot(*e)) for f, e in zip(found, expected, strict=True))


def test_an_output_has_vllms_names(llm: LLM) -> None:
    output = llm.embed("Hello there", use_tqdm=False)[0]
    assert isinstance(output, EmbeddingRequestOutput)
    assert output.finished
    assert (output.prompt, output.prompt_token_ids) == ("Hello there", llm.engine.tokenizer.encode("Hello there"))
    assert math.hypot(*output.outputs.embedding) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_normalized_vector_is_the_other_one_at_length_1(llm: LLM, pooling: Pooling) -> None:
    (plain,) = embed(llm, "A list", pooling=pooling, normalize=False)
    (unit,) = embed(llm, "A list", pooling=pooling)
    length = math.hypot(*plain)
    assert length > 1.5
    assert close([unit], [[x / length for x in plain]])


def test_the_mean_is_that_of_the_last_states_of_every_prefix(llm: LLM) -> None:
    ids = mixed_prompts(8)[3][:12] or [5, 6, 7]
    states = embed(llm, [ids[: n + 1] for n in range(len(ids))], normalize=False)
    (mean,) = embed(llm, [ids], pooling="mean", normalize=False)
    assert close([mean], [torch.tensor(states).mean(0).tolist()])


@pytest.mark.parametrize("pooling", POOLINGS)
def test_chunks_neighbours_and_preemption_change_nothing(llm: LLM, pooling: Pooling) -> None:
    prompts = mixed_prompts(16, seed=3)
    alone = [embed(llm, [prompt], pooling=pooling, normalize=False)[0] for prompt in prompts]
    assert close(embed(llm, prompts, pooling=pooling, normalize=False), alone)
    options: dict[str, Any] = {"max_model_len": 128, "kv_cache_memory_bytes": f"{9 * 16 * 3 * 2 * 2 * 64 * 4}B"}
    with LLM(path("llama-awq-g64"), dtype="float32", max_num_batched_tokens=8, **options) as small:
        engine = small.engine
        pending = [
            engine.make_embedding_request(f"e{i}", p, pooling=pooling, normalize=False) for i, p in enumerate(prompts)
        ]
        writing = [engine.make_request(f"g{i}", p, greedy(max_tokens=30)) for i, p in enumerate(prompts)]
        for pair in zip(writing, pending, strict=True):
            for request in pair:
                engine.add(request)
        found: dict[str, Any] = {}
        while engine.has_unfinished:
            for output in engine.step():
                assert (output.embedding is not None) == (output.finished and output.request_id.startswith("e"))
                found[output.request_id] = output
            engine.check_integrity()
        assert close([found[f"e{i}"].embedding for i in range(16)], alone)
        expected = tokens(run(llm, prompts, greedy(max_tokens=30)))
        assert [found[f"g{i}"].outputs[0].token_ids for i in range(16)] == expected
        assert engine.scheduler.stats.num_preemptions > 0
        assert engine.num_free_blocks == engine.info.num_blocks


def test_the_prefix_cache_serves_the_last_state_and_leaves_the_mean_alone(llm: LLM) -> None:
    prefix = [(7 * i) % 1999 + 3 for i in range(64)]
    first = {pooling: embed(llm, [[*prefix, 5]], pooling=pooling) for pooling in POOLINGS}
    hits = llm.engine.totals.prefix_cache_hits
    assert close(embed(llm, [[*prefix, 5]]), first["last"])
    assert llm.engine.totals.prefix_cache_hits == hits + 64
    assert close(embed(llm, [[*prefix, 5]], pooling="mean"), first["mean"])
    assert llm.engine.totals.prefix_cache_hits == hits + 64


def test_a_text_may_fill_the_whole_context(llm: LLM) -> None:
    limit = llm.engine.info.max_model_len
    assert len(embed(llm, [[5] * limit])) == 1
    with pytest.raises(RequestError, match=f"{limit + 1} tokens.*holds {limit};"):
        embed(llm, [[5], [5] * (limit + 1)])


@pytest.mark.parametrize(
    ("prompts", "more", "words"),
    [
        ([[]], {}, "empty"),
        ([[10**6]], {}, "token id"),
        ("a", {"pooling": "max"}, "expected 'last' or 'mean'"),
        ([{"text": "a"}], {}, "prompt dict"),
    ],
)
def test_what_is_refused(llm: LLM, prompts: Any, more: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        embed(llm, prompts, **more)


def test_a_vector_that_is_not_finite_fails_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = llm.engine._executor.runner  # type: ignore[attr-defined]
    forward = runner.model.forward

    def spoiled(x: torch.Tensor, *more: Any) -> torch.Tensor:
        hidden: torch.Tensor = forward(x, *more).clone()
        hidden[x == 77] = math.nan
        return hidden

    monkeypatch.setattr(runner.model, "forward", spoiled)
    good, bad = llm.engine.make_embedding_request("good", [5, 6]), llm.engine.make_embedding_request("bad", [5, 77])
    for request in (good, bad):
        llm.engine.add(request)
    outputs = {output.request_id: output for output in llm.engine.step()}
    assert outputs["good"].embedding is not None
    assert outputs["bad"].embedding is None
    assert "not finite" in str(outputs["bad"].error)


@pytest.mark.parametrize("split", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}])
def test_ranks_give_the_vectors_of_one_process(split: dict[str, int]) -> None:
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_model_len": 128, "max_num_batched_tokens": 16}
    prompts = mixed_prompts(6, seed=4)
    with LLM(path("llama-gptq-actorder-g32"), **options) as one:
        expected = [embed(one, prompts, pooling=pooling) for pooling in POOLINGS]
    with LLM(path("llama-gptq-actorder-g32"), **options, **split) as ranks:
        assert all(close(embed(ranks, prompts, pooling=p), e) for p, e in zip(POOLINGS, expected, strict=True))
        assert ranks.engine.num_free_blocks == ranks.engine.info.num_blocks


def test_a_closed_one_says_so() -> None:
    with LLM(path("llama-awq-g64"), dtype="float32", max_model_len=64) as closed:
        pass
    with pytest.raises(EngineDeadError):
        embed(closed, "a")
