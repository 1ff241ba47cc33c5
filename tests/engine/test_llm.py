"""The Python API on a small real checkpoint: batching, preemption, sampling, stopping, log-probabilities, errors."""

from __future__ import annotations

import gc
import random
import weakref
from typing import Any

import pytest
import torch

from qengine import LLM, SamplingParams
from qengine.errors import EngineDeadError, RequestError
from qengine.request import RequestOutput
from tests.engine.fixtures import path

PROMPT = "The class statement"


def greedy(**params: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 16, "ignore_eos": True, **params})


def run(llm: LLM, prompts: Any, params: Any) -> list[RequestOutput]:
    return llm.generate(prompts, params, use_tqdm=False)


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [choice.token_ids for output in outputs for choice in output.outputs]


def mixed_prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 2000) for _ in range(rng.choice([1, 2, 5, 17, 40, 75]))] for _ in range(count)]


def test_32_requests_through_a_small_pool_equal_one_by_one(llm: LLM) -> None:
    prompts = mixed_prompts(32)
    rng = random.Random(1)
    params = [greedy(max_tokens=rng.choice([1, 3, 12, 40])) for _ in prompts]
    alone = [tokens(run(llm, [p], [s]))[0] for p, s in zip(prompts, params, strict=True)]
    # 9 blocks of 16 tokens: one long request and little else at a time.
    options: dict[str, Any] = {"max_model_len": 128, "kv_cache_memory_bytes": f"{9 * 16 * 3 * 2 * 2 * 64 * 4}B"}
    with LLM(path("llama-awq-g64"), dtype="float32", max_num_batched_tokens=32, **options) as small:
        assert small.engine.info.num_blocks == 9
        assert tokens(run(small, prompts, params)) == alone
        assert small.engine.scheduler.stats.num_preemptions > 0
        small.engine.check_integrity()
        assert small.engine.num_free_blocks == 9


def test_a_shared_prefix_is_reused_and_changes_nothing(llm: LLM) -> None:
    prefix = [(11 * i) % 1999 + 3 for i in range(64)]
    first, second = run(llm, [[*prefix, 5]], greedy()), run(llm, [[*prefix, 9, 9]], greedy())
    assert second[0].num_cached_tokens == 64
    with LLM(path("llama-awq-g64"), dtype="float32", max_model_len=256, enable_prefix_caching=False) as cold:
        again = run(cold, [[*prefix, 5], [*prefix, 9, 9]], greedy())
        assert [o.num_cached_tokens for o in again] == [0, 0]
    assert tokens(first) + tokens(second) == tokens(again)


def test_prompt_forms(llm: LLM) -> None:
    ids = llm.engine.tokenizer.encode(PROMPT)
    forms: list[Any] = [PROMPT, [PROMPT], ids, [ids], {"prompt": PROMPT}, [{"prompt_token_ids": ids}]]
    results = [tokens(run(llm, form, greedy())) for form in forms]
    assert all(result == results[0] for result in results)
    assert run(llm, [], greedy()) == []


def test_outputs_keep_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = mixed_prompts(10, seed=4)
    params = [greedy(max_tokens=20 - 2 * i) for i in range(10)]
    outputs = run(llm, prompts, params)
    assert [o.prompt_token_ids for o in outputs] == prompts
    assert [len(o.outputs[0].token_ids) for o in outputs] == [p.max_tokens for p in params]
    assert all(o.finished and o.outputs[0].finish_reason == "length" for o in outputs)


def test_text_equals_decoding_all_tokens(llm: LLM) -> None:
    params = SamplingParams(temperature=1.5, max_tokens=60, ignore_eos=True, seed=3, n=4)
    for choice in run(llm, PROMPT, params)[0].outputs:
        assert choice.text == llm.engine.tokenizer.decode(choice.token_ids)


# Sampling


def test_a_seed_reproduces_whatever_else_runs(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=12, seed=42, ignore_eos=True)
    alone = tokens(run(llm, PROMPT, params))
    crowd = run(llm, [*mixed_prompts(5), PROMPT], [SamplingParams(max_tokens=20, temperature=1.0)] * 5 + [params])
    assert tokens(crowd)[-1] == alone[0]
    other = SamplingParams(temperature=1.0, max_tokens=12, seed=43, ignore_eos=True)
    assert tokens(run(llm, PROMPT, other)) != alone


def test_n_choices_are_those_of_consecutive_seeds(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.0, max_tokens=10, seed=7, ignore_eos=True)
    together = tokens(run(llm, PROMPT, params))
    singles = [
        tokens(run(llm, PROMPT, SamplingParams(temperature=1.0, max_tokens=10, seed=7 + i, ignore_eos=True)))[0]
        for i in range(3)
    ]
    assert together == singles
    assert len({tuple(t) for t in together}) == 3


def test_choices_share_the_blocks_of_their_prompt(llm: LLM) -> None:
    prompt = [(13 * i) % 1999 + 3 for i in range(100)]
    llm.engine.add(llm.engine.make_request("n", prompt, SamplingParams(n=4, max_tokens=8, ignore_eos=True)))
    least_free = llm.engine.info.num_blocks
    while llm.engine.has_unfinished:
        llm.engine.step()
        least_free = min(least_free, llm.engine.num_free_blocks)
    # Six full blocks of the prompt once, and one block of its own for each choice, not four times seven.
    assert llm.engine.info.num_blocks - least_free <= 6 + 4


def test_requests_without_a_seed_differ(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True)
    assert len({tuple(t) for t in tokens(run(llm, [PROMPT] * 4, params))}) > 1


def test_allowed_tokens_and_bias(llm: LLM) -> None:
    only = tokens(run(llm, PROMPT, greedy(allowed_token_ids=[50, 60], max_tokens=5)))[0]
    assert set(only) <= {50, 60}
    assert tokens(run(llm, PROMPT, greedy(logit_bias={77: 100.0}, max_tokens=3)))[0] == [77, 77, 77]


# Stopping


def test_stop_string_cuts_exactly(llm: LLM) -> None:
    full = run(llm, PROMPT, greedy(max_tokens=24))[0].outputs[0].text
    stop = full[9:13]
    assert len(stop) == 4
    cut = run(llm, PROMPT, greedy(max_tokens=24, stop=[stop, "never to be seen"]))[0].outputs[0]
    assert cut.text == full[: full.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    kept = run(llm, PROMPT, greedy(max_tokens=24, stop=stop, include_stop_str_in_output=True))[0].outputs[0]
    assert kept.text == full[: full.index(stop) + 4]


def test_stop_token_and_eos(llm: LLM) -> None:
    free = tokens(run(llm, PROMPT, greedy(max_tokens=24)))[0]
    token = free[5]
    first = free.index(token)
    stopped = run(llm, PROMPT, greedy(max_tokens=24, stop_token_ids=[token]))[0].outputs[0]
    assert stopped.token_ids == free[: first + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", token)
    assert stopped.text == llm.engine.tokenizer.decode(free[:first])
    eos = next(iter(llm.engine._eos_token_ids))
    ended = run(llm, PROMPT, SamplingParams(temperature=0.0, max_tokens=9, logit_bias={eos: 100.0}))[0].outputs[0]
    assert (ended.token_ids, ended.finish_reason, ended.stop_reason) == ([eos], "stop", None)
    longer = SamplingParams(temperature=0.0, max_tokens=9, min_tokens=4, logit_bias={eos: 100.0})
    assert len(run(llm, PROMPT, longer)[0].outputs[0].token_ids) == 5


def test_max_tokens_none_fills_the_context(llm: LLM) -> None:
    output = run(llm, [[5] * 250], greedy(max_tokens=None))[0].outputs[0]
    assert (len(output.token_ids), output.finish_reason) == (6, "length")
    assert len(run(llm, [[5] * 255], greedy(max_tokens=50))[0].outputs[0].token_ids) == 1


# Log-probabilities


def test_logprobs(llm: LLM) -> None:
    output = run(llm, PROMPT, greedy(logprobs=3, max_tokens=4))[0].outputs[0]
    assert output.logprobs is not None
    for token, position in zip(output.token_ids, output.logprobs, strict=True):
        assert len(position) == 3
        assert position[token].rank == 1
        assert [p.rank for p in position.values()] == [1, 2, 3]
        assert position[token].decoded_token == llm.engine.tokenizer.token_text(token)
    total = sum(position[token].logprob for token, position in zip(output.token_ids, output.logprobs, strict=True))
    assert output.cumulative_logprob == pytest.approx(total)
    assert run(llm, PROMPT, greedy())[0].outputs[0].logprobs is None


def test_prompt_logprobs_equal_those_of_generation(llm: LLM) -> None:
    generated = run(llm, PROMPT, greedy(logprobs=0, max_tokens=8))[0]
    choice = generated.outputs[0]
    whole = [*generated.prompt_token_ids, *choice.token_ids]
    for _ in range(2):  # The second time the prefix is cached: all positions must be there all the same.
        scored = run(llm, [whole], greedy(prompt_logprobs=0, max_tokens=1))[0]
        assert scored.prompt_logprobs is not None
        assert scored.prompt_logprobs[0] is None
        assert len(scored.prompt_logprobs) == len(whole)
        for i, token in enumerate(choice.token_ids, start=len(generated.prompt_token_ids)):
            position, mine = scored.prompt_logprobs[i], choice.logprobs
            assert position is not None
            assert mine is not None
            assert position[token].logprob == pytest.approx(
                mine[i - len(generated.prompt_token_ids)][token].logprob, abs=1e-4
            )


# Chat


def test_chat_uses_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "What is a class?"}]
    text = llm.engine.tokenizer.render_chat(messages)
    assert "<|im_start|>user\nWhat is a class?<|im_end|>" in text
    chatted = llm.chat(messages, greedy(), use_tqdm=False)
    ids = llm.engine.tokenizer.encode(text, add_special_tokens=False)
    assert tokens(chatted) == tokens(run(llm, [ids], greedy()))
    assert tokens(llm.chat([messages, messages], greedy(), use_tqdm=False)) == tokens(chatted) * 2


# Errors lose nothing


@pytest.mark.parametrize(
    ("prompt", "params", "word"),
    [
        ("", {}, "empty"),
        ([[]], {}, "empty"),
        ([[2048]], {}, "2048"),
        ([[-1]], {}, "-1"),
        ([[1.5]], {}, "1.5"),
        ([[True]], {}, "True"),
        ([[5] * 256], {}, "256"),
        ([[5] * 9000], {}, "9000"),
        (PROMPT, {"logit_bias": {2048: 1.0}}, "logit_bias"),
        (PROMPT, {"allowed_token_ids": [99999]}, "allowed_token_ids"),
        (PROMPT, {"stop_token_ids": [2048]}, "stop_token_ids"),
        (PROMPT, {"stop": "x", "detokenize": False}, "detokenize"),
        (PROMPT, {"allowed_token_ids": [2], "min_tokens": 1}, "allowed_token_ids"),
        (b"hello", {}, "prompts"),
        ({"text": "x"}, {}, "prompt_token_ids"),
        ([5, "x"], {}, "prompts"),
    ],
)
def test_bad_requests_are_refused_and_the_rest_goes_on(
    llm: LLM, prompt: Any, params: dict[str, Any], word: str
) -> None:
    before = tokens(run(llm, PROMPT, greedy()))
    with pytest.raises(RequestError, match=word):
        run(llm, prompt, greedy(**params))
    assert not llm.engine.has_unfinished
    assert tokens(run(llm, PROMPT, greedy())) == before


def test_one_bad_prompt_of_many_starts_nothing(llm: LLM) -> None:
    with pytest.raises(RequestError):
        run(llm, [PROMPT, [5] * 9000, PROMPT], greedy())
    assert not llm.engine.has_unfinished
    with pytest.raises(RequestError, match="2 prompts but 3"):
        run(llm, [PROMPT, PROMPT], [greedy()] * 3)


def test_abort_frees_everything_at_any_moment(llm: LLM) -> None:
    engine = llm.engine
    for steps in range(4):
        for i in range(3):
            engine.add(engine.make_request(f"r{i}", [5 + i] * 60, SamplingParams(n=2, max_tokens=50, ignore_eos=True)))
        for _ in range(steps):
            engine.step()
            engine.check_integrity()
        for i in range(3):
            engine.abort(f"r{i}")
            engine.abort(f"r{i}")
            engine.check_integrity()
        assert engine.num_free_blocks == engine.info.num_blocks
        assert not engine.has_unfinished


def test_duplicate_ids_are_refused(llm: LLM) -> None:
    engine = llm.engine
    engine.add(engine.make_request("same", PROMPT, greedy()))
    with pytest.raises(RequestError, match="same"):
        engine.add(engine.make_request("same", PROMPT, greedy()))
    engine.abort("same")


def test_nan_fails_one_request_and_no_other(llm: LLM) -> None:
    """A poisoned embedding row makes every sequence that contains the token fail, alone."""
    engine = llm.engine
    table = engine._executor.runner.model.embedding.table  # type: ignore[attr-defined]
    good = tokens(run(llm, [[7, 8, 9] * 20], greedy()))
    saved = table[1234].clone()
    table[1234] = torch.nan
    try:
        mixed = run(llm, [[7, 8, 9] * 20, [1234] * 40, [7, 8, 9] * 20], greedy())
    finally:
        table[1234] = saved
    assert tokens([mixed[0], mixed[2]]) == good * 2
    assert mixed[1].outputs[0].finish_reason == "error"
    assert mixed[1].error is not None
    assert "not finite" in mixed[1].error
    # The same prompt is sound again: nothing of the poisoned keys was kept for reuse.
    healed = run(llm, [[1234] * 40], greedy())[0]
    assert healed.error is None
    assert healed.outputs[0].finish_reason == "length"
    assert tokens(run(llm, [[7, 8, 9] * 20], greedy())) == good


def test_nan_while_decoding_fails_one_request_and_no_other(llm: LLM) -> None:
    """The poisoned token is forced in the middle of a batch, beside longer and shorter sequences."""
    engine = llm.engine
    table = engine._executor.runner.model.embedding.table  # type: ignore[attr-defined]
    prompts: list[list[int]] = [[9] * 3, [7, 8] * 20, [5] * 21]
    alone = [tokens(run(llm, [p], greedy()))[0] for p in prompts]
    saved = table[1234].clone()
    table[1234] = torch.nan
    try:
        forced = greedy(logit_bias={1234: 100.0})
        outputs = run(llm, [prompts[0], [6] * 12, prompts[1], prompts[2]], [greedy(), forced, greedy(), greedy()])
    finally:
        table[1234] = saved
    assert [o.error is None for o in outputs] == [True, False, True, True]
    assert [outputs[i].outputs[0].token_ids for i in (0, 2, 3)] == alone
    assert outputs[1].outputs[0].token_ids == [1234]


def test_an_interrupted_call_leaves_a_working_engine(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tokens(run(llm, PROMPT, greedy()))
    executor = llm.engine._executor
    real, calls = executor.begin, []

    def interrupted(batch: Any) -> Any:
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(batch)

    monkeypatch.setattr(executor, "begin", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(llm, [PROMPT, [5] * 40], greedy())
    llm.engine.check_integrity()
    assert not llm.engine.has_unfinished
    assert tokens(run(llm, PROMPT, greedy())) == before


def test_stop_strings_wait_for_min_tokens(llm: LLM) -> None:
    full = run(llm, PROMPT, greedy(max_tokens=24))[0].outputs[0].text
    stop = full[2:4]
    early = run(llm, PROMPT, greedy(max_tokens=24, stop=stop))[0].outputs[0]
    late = run(llm, PROMPT, greedy(max_tokens=24, stop=stop, min_tokens=12))[0].outputs[0]
    assert len(early.token_ids) < 12 <= len(late.token_ids)


def test_ids_of_choices_cannot_be_taken(llm: LLM) -> None:
    engine = llm.engine
    engine.add(engine.make_request("x", PROMPT, greedy(n=2)))
    with pytest.raises(RequestError, match="x#0"):
        engine.add(engine.make_request("x#0", PROMPT, greedy()))
    engine.abort("x")


def test_an_idle_step_does_nothing(llm: LLM) -> None:
    assert llm.engine.step() == []
    assert run(llm, PROMPT, greedy())


def test_shutdown_releases_the_model() -> None:
    llm = LLM(path("llama-awq-g64"), dtype="float32", max_model_len=64)
    model = weakref.ref(llm.engine._executor.runner.model)  # type: ignore[attr-defined]
    llm.shutdown()
    gc.collect()
    assert model() is None


def test_float16_runs_on_the_dense_path(llm: LLM) -> None:
    with LLM(path("llama-awq-g64"), dtype="float16", max_model_len=64) as half:
        assert tokens(run(half, PROMPT, greedy(max_tokens=4))) == tokens(run(llm, PROMPT, greedy(max_tokens=4)))


def test_after_shutdown_it_says_so() -> None:
    llm = LLM(path("llama-awq-g64"), dtype="float32", max_model_len=64)
    llm.shutdown()
    llm.shutdown()
    with pytest.raises(EngineDeadError, match="shut down"):
        run(llm, PROMPT, greedy())


def test_a_failure_inside_a_step_kills_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(path("llama-awq-g64"), dtype="float32", max_model_len=64) as llm:

        def broken(*_: Any) -> torch.Tensor:
            raise RuntimeError("evil forward")

        monkeypatch.setattr(llm.engine._executor.runner.model, "forward", broken)  # type: ignore[attr-defined]
        with pytest.raises(RuntimeError, match="evil forward"):
            run(llm, PROMPT, greedy())
        with pytest.raises(EngineDeadError, match="restart"):
            run(llm, PROMPT, greedy())
