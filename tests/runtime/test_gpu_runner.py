"""The runner on a real GPU: recorded steps against launched ones, and a host that never waits in between.

Everything else of it is tested in Triton's interpreter (`tests/engine/test_triton_engine.py`). Tokens are equal only
where the kernels that run are, so both engines get the same batches.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from qengine import SamplingParams
from qengine.config import EngineConfig
from qengine.engine import Engine
from qengine.runtime.executors import UniprocExecutor
from qengine.runtime.runner import ModelRunner
from qengine.scheduling.batch import Batch, BatchEntry, SampleSpec
from tests.engine.triton_engine import OPTIONS, run, tiny_folder, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIZES = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2}
PROMPTS = [[(7 * i + j) % 2000 for j in range(1 + 9 * i)] for i in range(12)]


def start(folder: Path, **options: object) -> Engine:
    model = tiny_folder(folder, **SIZES)
    wanted = {**OPTIONS, "dtype": "bfloat16", "device": "cuda", "gpu_memory_limit": "4GiB", **options}
    return Engine.start(EngineConfig.from_options({"model": model, **wanted}))


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8", "fp8"])
def test_recorded_steps_give_the_tokens_of_launched_ones(tmp_path: Path, kv_cache_dtype: str) -> None:
    found = []
    for eager in (True, False):
        engine = start(tmp_path, kv_cache_dtype=kv_cache_dtype, enforce_eager=eager)
        found.append(tokens(run(engine, PROMPTS, SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True))))
        engine.shutdown()
    assert found[0] == found[1]


def _runner(engine: Engine) -> ModelRunner:
    executor = engine._executor
    assert isinstance(executor, UniprocExecutor)
    return executor.runner


def _step(start: int, ids: tuple[int, ...], params: SamplingParams, *, targets: tuple[int, ...] = ()) -> Batch:
    spec = SampleSpec(params, 1, ids, (), frozenset())
    wanted = params.prompt_logprobs if targets else None
    return Batch((BatchEntry("a", ids, start, tuple(range(4)), spec, wanted, targets),))


@pytest.mark.parametrize(
    "make_step",
    [
        lambda: _step(0, tuple(range(50)), SamplingParams(temperature=0.0)),
        lambda: _step(50, (3,), SamplingParams(temperature=0.8, top_p=0.9, logprobs=3)),
        lambda: _step(0, tuple(range(50)), SamplingParams(prompt_logprobs=2), targets=tuple(range(1, 50))),
    ],
    ids=["prompt", "decode", "prompt logprobs"],
)
def test_the_host_never_waits_between_begin_and_finish(tmp_path: Path, make_step: Callable[[], Batch]) -> None:
    engine = start(tmp_path)
    runner = _runner(engine)
    runner.step(make_step())
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = runner.begin(make_step())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    result = pending.finish()
    assert result.sampled["a"].token_id >= 0
    engine.shutdown()
