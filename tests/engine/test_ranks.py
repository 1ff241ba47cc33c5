"""One model in several processes gives the tokens of one process: tensor-parallel, in stages, and both."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from benchmarks.synthetic import GROUP_SIZE, Sizes, write_checkpoint
from qengine import LLM, SamplingParams, StructuredOutputs, startup
from qengine.config import EngineConfig
from qengine.engine import Engine
from qengine.errors import ConfigError, EngineDeadError, LoadError
from qengine.runtime import spawn_executor
from qengine.runtime.messages import Clear
from qengine.runtime.planner import MemoryPlan
from qengine.runtime.spawn_executor import SpawnExecutor
from qengine.startup import start_parts
from tests.engine.fixtures import path
from tests.engine.test_llm import greedy, mixed_prompts, run, tokens
from tests.serving.rank_server import own_ranks, spoil
from tests.waiting import WAIT_SECONDS, wait_until

FIXTURE = path("llama-gptq-actorder-g32")
#: Keys and values of one block of 16 tokens in float32: 3 layers of 2 heads of 64.
BLOCK_BYTES = 16 * 3 * 2 * 2 * 64 * 4
OPTIONS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_model_len": 128}
#: Steps take milliseconds here.
STEP_TIMEOUT = 2.0


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    before = own_ranks()
    yield
    assert own_ranks() == before


def prompts() -> list[list[int]]:
    """32 prompts, of which every fourth begins with the same 40 tokens."""
    common = [(11 * i) % 1999 + 3 for i in range(40)]
    return [[*common, *prompt[:9]] if i % 4 == 0 else prompt for i, prompt in enumerate(mixed_prompts(32, seed=2))]


def params() -> list[SamplingParams]:
    rng = random.Random(1)
    return [greedy(max_tokens=rng.choice([1, 3, 12, 40])) for _ in range(32)]


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    """Each prompt's tokens, one by one in a single process."""
    with LLM(FIXTURE, **OPTIONS) as llm:
        return [tokens(run(llm, [prompt], [one]))[0] for prompt, one in zip(prompts(), params(), strict=True)]


@pytest.mark.parametrize(
    ("tp", "pp", "p2p", "num_prompts"),
    [(2, 1, "on", 32), (1, 2, "on", 32), (2, 2, "on", 10), (3, 1, "on", 8), (2, 2, "auto", 10), (3, 1, "auto", 8)],
)
def test_any_split_gives_the_tokens_of_one_rank(
    tp: int, pp: int, p2p: str, num_prompts: int, alone: list[list[int]]
) -> None:
    """Batched, in chunks, with prefix hits and preemption, through a cache that holds little more than one request; by
    gloo ("on") and through host memory."""
    asked, wanted, expected = prompts()[:num_prompts], params()[:num_prompts], alone[:num_prompts]
    room = 9 * BLOCK_BYTES * max(2, tp) // 2  # A rank beyond the two KV heads has a copy of one.
    sizes = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp, "kv_cache_memory_bytes": f"{room}B"}
    with LLM(FIXTURE, **OPTIONS, **sizes, p2p=p2p, max_num_batched_tokens=32) as llm:
        engine = llm.engine
        assert engine.info.num_blocks == 9
        assert tokens(run(llm, asked, wanted)) == expected
        assert engine.scheduler.stats.num_preemptions > 0
        engine.check_integrity()
        assert not engine.has_unfinished
        assert engine.num_free_blocks == 9
        for _ in range(2):
            again = run(llm, asked[0], wanted[0])[0]
            assert again.outputs[0].token_ids == expected[0]
        assert again.num_cached_tokens > 0


@pytest.fixture(scope="module")
def odd_groups(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[list[int]]]:
    """A model whose MLP has a number of groups that no number of ranks divides, and its tokens in one process."""
    folder = tmp_path_factory.mktemp("odd")
    write_checkpoint(folder, Sizes(384, request.param * GROUP_SIZE, 6, 3, num_layers=2, vocab_size=2048), "awq")
    for file in Path(FIXTURE).glob("*token*"):
        shutil.copy(file, folder)
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        if (table := tensors.get("model.embed_tokens.weight")) is not None:
            # Else a token's own embedding outweighs what the layers make of it.
            save_file({**tensors, "model.embed_tokens.weight": table * 0.01}, shard, metadata={"format": "pt"})
    with LLM(str(folder), **OPTIONS) as llm:
        return str(folder), tokens(run(llm, mixed_prompts(6, seed=5), greedy(max_tokens=16)))


@pytest.mark.parametrize(
    ("odd_groups", "tp", "pp"),
    [(107, 2, 1), (107, 3, 1), (107, 2, 2), (231, 2, 1), (231, 3, 1), (231, 1, 2)],
    indirect=["odd_groups"],
    scope="module",
)
def test_an_mlp_that_does_not_divide_gives_the_tokens_of_one_rank(
    odd_groups: tuple[str, list[list[int]]], tp: int, pp: int
) -> None:
    """By gloo, 54 + 53 and 116 + 115 groups on two ranks, thirds on three; a layer on each stage."""
    folder, expected = odd_groups
    assert len({token for one in expected for token in one}) > 16, "a model that says one thing shows nothing"
    with LLM(folder, **OPTIONS, tensor_parallel_size=tp, pipeline_parallel_size=pp, p2p="on") as llm:
        assert tokens(run(llm, mixed_prompts(6, seed=5), greedy(max_tokens=16))) == expected


def test_stages_of_unlike_sizes_give_the_tokens_of_one_rank(
    alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where cards are unlike: stages have the layers that the plan gives them, where evenly they would be 2 + 1."""
    real = startup.plan_ranks

    def plan_ranks(*arguments: Any) -> MemoryPlan:
        return replace(real(*arguments), stage_layers=(1, 2))

    monkeypatch.setattr(startup, "plan_ranks", plan_ranks)
    with LLM(FIXTURE, **OPTIONS, pipeline_parallel_size=2, max_num_batched_tokens=32) as llm:
        assert tokens(run(llm, prompts()[:6], params()[:6])) == alone[:6]


def test_ranks_say_what_their_start_took(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "qengine")
    with LLM(FIXTURE, **OPTIONS, pipeline_parallel_size=2) as llm:
        seconds = llm.engine.info.start_seconds
    assert list(seconds) == ["plan", "tokenizer", "ranks", "weights", "warm-up", "read", "convert", "total"]
    assert min(seconds["read"], seconds["convert"]) > 0
    [table] = [message for message in caplog.messages if message.startswith("start ")]
    assert "GB/s" in table
    assert table.count("(the slowest of 2 ranks)") == 2


def test_everything_a_request_can_ask_for_passes_between_processes(llm: LLM) -> None:
    """On two by two ranks what one process answers: sampling, penalties, log-probabilities, choices, stops."""
    asked = [
        SamplingParams(temperature=1.0, top_p=0.9, top_k=40, min_p=0.01, seed=3, n=3, max_tokens=12),
        greedy(logprobs=3, prompt_logprobs=2, max_tokens=6),
        greedy(presence_penalty=1.5, frequency_penalty=0.5, repetition_penalty=1.3, max_tokens=24),
        greedy(logit_bias={77: 100.0}, max_tokens=3),
        greedy(allowed_token_ids=[50, 60], max_tokens=5, stop_token_ids=[60], min_tokens=2),
        greedy(stop=["\n"], max_tokens=30),
        greedy(structured_outputs=StructuredOutputs(regex="[0-9]{12}"), max_tokens=30),
    ]
    texts = ["The class statement"] * len(asked)
    expected = run(llm, texts, asked)
    sizes = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    with LLM(path("llama-awq-g64"), **{**OPTIONS, **sizes, "max_model_len": 256}) as split:
        found = run(split, texts, asked)
    assert tokens(found) == tokens(expected)
    assert [[c.finish_reason for c in o.outputs] for o in found] == [
        [c.finish_reason for c in o.outputs] for o in expected
    ]
    assert_close(found[1].outputs[0].logprobs, expected[1].outputs[0].logprobs)
    assert_close(found[1].prompt_logprobs, expected[1].prompt_logprobs)


def assert_close(found: Any, expected: Any) -> None:
    """Log-probabilities of the same tokens, as close as sums in another order are."""
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        for token_id in theirs or ():
            assert ours[token_id].logprob == pytest.approx(theirs[token_id].logprob, abs=1e-4)


def test_nan_fails_one_request_and_its_blocks_are_cleaned_on_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token's embedding is broken. Only the rank that samples sees it; all of them have it in their caches."""
    real, cleared = SpawnExecutor._order, []

    def order(self: SpawnExecutor, message: Any) -> None:
        if isinstance(message, Clear):
            cleared.append(len(message.block_ids))
        real(self, message)

    monkeypatch.setattr(SpawnExecutor, "_order", order)
    for file in Path(FIXTURE).iterdir():
        shutil.copy(file, tmp_path)
    spoil(tmp_path / "model.safetensors", "model.embed_tokens.weight", 1234 * 256)
    sizes = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "kv_cache_memory_bytes": f"{9 * BLOCK_BYTES}B"}
    with LLM(str(tmp_path), **OPTIONS, **sizes, enable_prefix_caching=False) as llm:
        # Of unlike lengths, so that a step reads slots of their blocks that they have not filled.
        sound = [[7, 8, 9] * 10, [7, 8], [9] * 17]
        expected = [tokens(run(llm, [prompt], greedy()))[0] for prompt in sound]
        for _ in range(2):
            [mixed, failed] = run(llm, [sound[0], [1234] * 70], greedy())
            assert mixed.outputs[0].token_ids == expected[0]
            assert failed.outputs[0].finish_reason == "error"
            assert "not finite" in (failed.error or "")
            assert tokens(run(llm, sound, greedy())) == expected
        assert cleared == [5, 5]  # 70 tokens take 5 blocks.


def test_requests_leave_a_pipeline_at_any_moment() -> None:
    with LLM(path("llama-awq-g64"), **{**OPTIONS, "pipeline_parallel_size": 2}) as llm:
        engine = llm.engine
        before = tokens(run(llm, [[5] * 40], greedy()))
        for num_steps in range(5):
            for index in range(4):
                request = engine.make_request(f"r{index}", [5 + index] * 60, greedy(n=2, max_tokens=50))
                engine.add(request)
            for _ in range(num_steps):
                engine.step()
                engine.check_integrity()
            for index in range(4):
                engine.abort(f"r{index}")
                engine.check_integrity()
            while engine.has_unfinished:
                engine.step()
            assert engine.num_free_blocks == engine.info.num_blocks
        assert tokens(run(llm, [[5] * 40], greedy())) == before


def test_ctrl_c_in_the_middle_of_a_step_leaves_a_working_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(path("llama-awq-g64"), **{**OPTIONS, "pipeline_parallel_size": 2}) as llm:
        before = tokens(run(llm, [[5] * 40], greedy()))
        real, calls = SpawnExecutor.finish, []

        def interrupted(self: SpawnExecutor, batch: Any) -> Any:
            calls.append(batch)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return real(self, batch)

        monkeypatch.setattr(SpawnExecutor, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(llm, [[5] * 40, [6] * 40], greedy())
        llm.engine.check_integrity()
        assert tokens(run(llm, [[5] * 40], greedy())) == before
        assert not llm.engine.has_unfinished
        assert llm.engine.num_free_blocks == llm.engine.info.num_blocks


# Starts and steps that fail


def start_failing(bad_rank: int, how: str, **options: Any) -> Engine:
    command = (sys.executable, "-m", "tests.runtime.failing_rank", str(bad_rank), how)
    config = EngineConfig.from_options({"model": path("llama-awq-g64"), **OPTIONS, **options})
    return Engine(start_parts(config, rank_command=command))


def run_to_the_end(engine: Engine) -> None:
    while engine.has_unfinished:
        engine.step()


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("raise", r"rank 1: RuntimeError: evil forward, \d{6,} objects out of the collector's sight"),
        ("run out", "rank 1: out of memory in a step: Tried to allocate 2.00 GiB; ranks cannot take a step back"),
        ("vanish", r"rank 1 \(process \d+\) ended with exit code 7"),
        ("garbage", "rank 1: a message of 10 bytes cannot be read"),
        ("hang", r"rank 1 did not answer within 2 s \(--step-timeout\)"),
    ],
)
def test_a_rank_of_a_pipeline_that_fails_is_the_end_and_is_named(how: str, reason: str) -> None:
    limit = {"step_timeout": STEP_TIMEOUT} if how == "hang" else {}
    engine = start_failing(1, how, pipeline_parallel_size=2, **limit)
    told: list[str] = []
    try:
        engine.on_failure(told.append)
        engine.add(engine.make_request("a", [5] * 40, greedy(max_tokens=40)))
        with pytest.raises(EngineDeadError, match=reason):
            run_to_the_end(engine)
        with pytest.raises(EngineDeadError):
            engine.step()
        with pytest.raises(EngineDeadError):
            engine.add(engine.make_request("b", [5] * 40, greedy()))
        wait_until(lambda: bool(told))  # In the thread that noticed it, which may be another.
        assert len(told) == 1
    finally:
        engine.shutdown()


def test_a_rank_that_fails_within_a_sum_says_why_before_those_that_miss_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spawn_executor, "_CAUSE_SECONDS", WAIT_SECONDS)
    engine = start_failing(1, "break a sum", tensor_parallel_size=2)
    try:
        engine.add(engine.make_request("a", [5] * 40, greedy(max_tokens=40)))
        with pytest.raises(EngineDeadError, match="has stopped: rank 1: RuntimeError: evil sum"):
            run_to_the_end(engine)
    finally:
        engine.shutdown()


def test_a_rank_that_dies_while_nothing_runs_is_noticed_at_once() -> None:
    engine = Engine.start(EngineConfig.from_options({"model": FIXTURE, **OPTIONS, "tensor_parallel_size": 2}))
    told: list[str] = []
    try:
        engine.on_failure(told.append)
        engine._executor.check(30.0)
        [_, victim] = own_ranks()[-2:]
        os.kill(victim, 9)
        wait_until(lambda: bool(told))
        assert "was killed by SIGKILL" in told[0]
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            engine._executor.check(30.0)
        late: list[str] = []
        engine.on_failure(late.append)
        assert late == told
    finally:
        engine.shutdown()


def test_a_rank_that_is_stopped_before_the_first_request_is_noticed_as_soon_as_later() -> None:
    """Nothing is compiled on a CPU: there the first step is given no longer than others."""
    engine = Engine.start(
        EngineConfig.from_options(
            {"model": FIXTURE, **OPTIONS, "tensor_parallel_size": 2, "step_timeout": STEP_TIMEOUT}
        )
    )
    try:
        [*_, victim] = own_ranks()
        os.kill(victim, signal.SIGSTOP)
        engine.add(engine.make_request("a", [5] * 40, greedy()))
        begin = time.monotonic()
        reason = rf"rank 1 \(process {victim}\) is stopped; rank 0 did not answer within 2 s \(--step-timeout\)"
        with pytest.raises(EngineDeadError, match=reason):
            run_to_the_end(engine)
        assert time.monotonic() - begin < WAIT_SECONDS, "the first step on a card is given ten minutes"
    finally:
        engine.shutdown()


def test_a_start_that_cannot_work_is_refused_by_name() -> None:
    for options, message in (
        ({"tensor_parallel_size": 5}, "tensor_parallel_size is 5"),
        ({"pipeline_parallel_size": 4}, "pipeline_parallel_size is 4, but the model has 3 layers"),
    ):
        with pytest.raises(ConfigError, match=message):
            LLM(FIXTURE, **OPTIONS, **options)


def test_a_rank_that_does_not_come_is_a_load_error(monkeypatch: pytest.MonkeyPatch) -> None:
    real = SpawnExecutor.join
    monkeypatch.setattr(SpawnExecutor, "join", lambda self: real(self, 8.0))
    with pytest.raises(LoadError, match=r"rank (0, )?1 did not answer within 8 s: the ranks cannot reach each other"):
        start_failing(1, "stop", tensor_parallel_size=2)


@pytest.mark.parametrize(
    ("how", "reason"),
    [("stop loading", ": it hangs or is stopped while it loads"), ("stop allocating", ": it hangs or is")],
)
def test_a_rank_that_is_stopped_in_the_start_is_a_load_error(
    how: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the others load, they say that they live."""
    monkeypatch.setattr(spawn_executor, "LOADING_SILENCE_SECONDS", 4.0)
    with pytest.raises(LoadError, match=f"rank 1 did not answer within 4 s{reason}"):
        start_failing(1, how, tensor_parallel_size=2)


def test_a_rank_that_loads_for_long_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spawn_executor, "LOADING_SILENCE_SECONDS", 4.0)
    engine = start_failing(1, "load slowly", tensor_parallel_size=2)
    engine.shutdown()


def test_a_rank_that_ends_while_it_loads_is_a_load_error(tmp_path: Path) -> None:
    command = (sys.executable, "-c", "import sys; sys.exit('no such thing')")
    config = EngineConfig.from_options({"model": FIXTURE, **OPTIONS, "tensor_parallel_size": 2})
    with pytest.raises(LoadError, match=r"rank \d .*ended with exit code 1"):
        start_parts(config, rank_command=command)
    with pytest.raises(LoadError, match="cannot be started"):
        start_parts(config, rank_command=(str(tmp_path / "nothing"),))
