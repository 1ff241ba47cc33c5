"""A tiny model wholly on the Triton kernels gives, in float32, the tokens of the CPU path.

Batched, chunked, with prefix hits, with preemption, with every KV format, replayed from recordings, greedy and sampled;
and the checkpoints of other programs give the tokens that were computed independently of us.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from qengine import SamplingParams
from qengine.errors import ConfigError
from tests.engine.fixtures import NAMES, expected, path
from tests.engine.triton_engine import (
    OPTIONS,
    ReplayingRecorder,
    run,
    start,
    tiny_folder,
    tokens,
    triton_platform,
)

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="needs the interpreter; see benchmarks.gpu_check"),
    # numpy on rows that fill tiles or batches up: whatever was there.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered"),
]
GREEDY = SamplingParams(temperature=0.0, max_tokens=5, logprobs=0, ignore_eos=True)
PROMPTS = [[(7 * i + 3 * j) % 2000 + 3 for j in range(length)] for i, length in enumerate((5, 40, 17, 1))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def wanted(folder: str) -> list[list[int]]:
    """The CPU's tokens."""
    return tokens(run(start(None, model=folder, **OPTIONS), PROMPTS, GREEDY))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="batched"),
        pytest.param({"max_num_batched_tokens": 16, "block_size": 32}, id="chunked"),
        pytest.param({"max_num_seqs": 1, "enable_prefix_caching": False}, id="one at a time"),
    ],
)
def test_tokens_of_the_cpu(folder: str, wanted: list[list[int]], options: dict[str, Any]) -> None:
    assert tokens(run(start(triton_platform(), model=folder, **OPTIONS, **options), PROMPTS, GREEDY)) == wanted


def test_log_probabilities_of_the_cpu(folder: str) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=2, logprobs=3, prompt_logprobs=1, ignore_eos=True)
    mine, theirs = (run(start(p, model=folder, **OPTIONS), PROMPTS[:1], params)[0] for p in (triton_platform(), None))
    assert mine.prompt_logprobs is not None
    assert theirs.prompt_logprobs is not None
    assert mine.outputs[0].logprobs is not None
    assert theirs.outputs[0].logprobs is not None
    for a, b in zip(
        [*mine.prompt_logprobs[1:], *mine.outputs[0].logprobs],
        [*theirs.prompt_logprobs[1:], *theirs.outputs[0].logprobs],
        strict=True,
    ):
        assert a is not None
        assert b is not None
        assert a.keys() == b.keys()
        assert all(abs(a[token].logprob - b[token].logprob) < 1e-4 for token in a)


def test_prefix_hits(folder: str) -> None:
    prompts = [PROMPTS[1], [*PROMPTS[1][:35], 9, 8]]
    cold = tokens([run(start(None, model=folder, **OPTIONS), [p], GREEDY)[0] for p in prompts])
    engine = start(triton_platform(), model=folder, **OPTIONS)
    outputs = [run(engine, [p], GREEDY)[0] for p in (*prompts, prompts[0])]
    assert [o.num_cached_tokens for o in outputs] == [0, 32, 32]
    assert tokens(outputs) == [*cold, cold[0]]


def test_preemption(folder: str, wanted: list[list[int]]) -> None:
    # 2 layers of keys and values of 2 heads of 16 numbers in float32: five blocks of 16 tokens.
    room = {"kv_cache_memory_bytes": 5 * 16 * 2 * 2 * 2 * 16 * 4, "max_model_len": 64}
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    prompts = [PROMPTS[0] * 3, PROMPTS[2], PROMPTS[3]]
    roomy = tokens(run(start(None, model=folder, **OPTIONS), prompts, params))
    engine = start(triton_platform(), model=folder, **{**OPTIONS, **room})
    assert tokens(run(engine, prompts, params)) == roomy
    assert engine.scheduler.stats.num_preemptions > 0


#: Both paths store the same bytes and compute in float32 with them; a cache of floats is computed with in its own type
#: on the CPU, so that queries are rounded too: half a unit roundoff in scores of about 1.
TOLERANCES = {"int8": 1e-5, "fp8": 1e-5, "fp8_e5m2": 1e-5, "float16": 2.0**-10, "bfloat16": 2.0**-6}


@pytest.mark.parametrize("kv_cache_dtype", TOLERANCES)
def test_kv_formats(folder: str, kv_cache_dtype: str) -> None:
    options = {**OPTIONS, "kv_cache_dtype": kv_cache_dtype}
    mine, theirs = (run(start(p, model=folder, **options), PROMPTS[:2], GREEDY) for p in (triton_platform(), None))
    assert tokens(mine) == tokens(theirs)
    for a, b in zip(mine, theirs, strict=True):
        for token, x, y in zip(tokens([a])[0], a.outputs[0].logprobs or (), b.outputs[0].logprobs or (), strict=True):
            assert abs(x[token].logprob - y[token].logprob) < TOLERANCES[kv_cache_dtype]


def test_recorded_steps_equal_launched_ones(folder: str, wanted: list[list[int]]) -> None:
    recorder = ReplayingRecorder()
    engine = start(triton_platform(recorder), model=folder, **OPTIONS, max_num_seqs=4)
    short = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    begin = [ids[:3] for ids in wanted]
    assert tokens(run(engine, PROMPTS, short)) == begin
    assert tokens(run(engine, PROMPTS[:3], short)) == begin[:3]
    assert tokens(run(engine, PROMPTS[1:2], short)) == begin[1:2]
    # A single sequence's step was recorded and run at the start; four and three sequences share the bucket of four.
    assert [r.num_replays for r in recorder.recordings] == [1 + 2, 4]


def test_seeds_draw_what_they_draw_on_the_cpu(folder: str) -> None:
    params = [
        SamplingParams(temperature=0.9, seed=1, max_tokens=4, ignore_eos=True),
        SamplingParams(temperature=1.2, top_k=20, seed=2, max_tokens=4, ignore_eos=True),
        SamplingParams(temperature=0.8, top_p=0.7, min_p=0.01, seed=3, max_tokens=4, ignore_eos=True),
        SamplingParams(temperature=0.0, repetition_penalty=1.3, max_tokens=4, ignore_eos=True),
    ]
    mine, theirs = (run(start(p, model=folder, **OPTIONS), PROMPTS, *params) for p in (triton_platform(), None))
    assert tokens(mine) == tokens(theirs)


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_of_other_programs(name: str) -> None:
    [want, *_] = expected(name)
    engine = start(triton_platform(), model=path(name), dtype="float32", max_model_len=64)
    params = SamplingParams(temperature=0.0, max_tokens=2, logprobs=0, ignore_eos=True)
    [output] = run(engine, [want.prompt], params)
    assert tokens([output]) == [want.greedy_token_ids[:2]]
    assert output.outputs[0].logprobs is not None
    for token, found, logprob in zip(want.greedy_token_ids, output.outputs[0].logprobs, want.logprobs, strict=False):
        assert abs(found[token].logprob - logprob) < 1e-3


def test_a_block_size_that_attention_does_not_take(folder: str) -> None:
    with pytest.raises(ConfigError, match="block_size is 8, but a GPU's attention takes 16 or 32"):
        start(triton_platform(), model=folder, **OPTIONS, block_size=8)


def test_too_many_heads_for_a_tile(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path, num_attention_heads=128, num_key_value_heads=1, hidden_size=256)
    with pytest.raises(ConfigError, match="128 query heads per KV head"):
        start(triton_platform(), model=model, **OPTIONS)
