"""Engines of several ranks by the way their tensors go: through host memory they give the tokens of one rank, and ranks
that do not find each other are ended with advice."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import pytest

from qengine.config import EngineConfig
from qengine.engine import Engine
from qengine.errors import TransportError
from qengine.parallel.verdicts import Route
from qengine.request import SamplingParams
from qengine.runtime import spawn_executor
from qengine.startup import start_parts
from tests.engine.fixtures import path

PROMPTS = ([5, 6, 7], [11, 3, 1999, 42, 8] * 7, [1])


def config_of(**options: Any) -> EngineConfig:
    given = {"model": path("llama-awq-g64"), "dtype": "float32", "max_model_len": 128, **options}
    return EngineConfig.from_options(given)


def tokens_of(engine: Engine) -> list[Sequence[int]]:
    """Greedy answers to all prompts at once; the engine is shut down."""
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    found = {}
    try:
        for index, prompt in enumerate(PROMPTS):
            engine.add(engine.make_request(str(index), list(prompt), params))
        while engine.has_unfinished:
            found.update({output.request_id: output for output in engine.step() if output.finished})
    finally:
        engine.shutdown()
    return [list(found[str(index)].outputs[0].token_ids) for index in range(len(PROMPTS))]


def test_tensors_through_host_memory_give_the_tokens_of_one_rank() -> None:
    alone = tokens_of(Engine.start(config_of()))
    config = config_of(tensor_parallel_size=2, pipeline_parallel_size=2)
    assert tokens_of(Engine(start_parts(config, route=Route.HOST_STAGED))) == alone


@pytest.mark.parametrize("route", [Route.PEER, Route.HOST_STAGED])
def test_ranks_that_do_not_find_each_other_are_ended(
    route: Route, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    executors = []
    real = spawn_executor.SpawnExecutor.__init__

    def impatient(self: spawn_executor.SpawnExecutor, *arguments: Any, **options: Any) -> None:
        executors.append(self)
        real(self, *arguments, **options, connect_limit_s=0.5)

    monkeypatch.setattr(spawn_executor.SpawnExecutor, "__init__", impatient)
    command = (sys.executable, "-m", "tests.runtime.stalled_rank", "1")
    with pytest.raises(TransportError, match=r"did not finish within 0\.5 s; all ranks were ended") as caught:
        start_parts(config_of(tensor_parallel_size=2), rank_command=command, route=route)
    assert all(rank.process.returncode is not None for rank in executors[0]._processes.ranks)
    assert ("--p2p off" in str(caught.value)) == (route is Route.PEER), "advice on NCCL is not for host memory"
    assert "the ranks were stopped: the first sum over all ranks did not finish within 0.5 s" in caplog.messages
