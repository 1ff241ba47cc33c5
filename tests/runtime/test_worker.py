"""What one rank does when it is told, in this process: its cache is cleaned, its state is checked, its model let go."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qengine.config import EngineConfig
from qengine.errors import EngineDeadError
from qengine.runtime import platform
from qengine.runtime import worker as worker_module
from qengine.runtime.channel import ProtocolError
from qengine.runtime.checkpoint_check import Findings
from qengine.runtime.links import Links
from qengine.runtime.loader import open_model
from qengine.runtime.messages import Check, Clear, Done, Start
from qengine.runtime.platform import Platform
from qengine.runtime.rank_service import _follow
from qengine.runtime.step_messages import StepReader
from qengine.runtime.worker import Worker
from quant_kernels.linear.dispatch import Target
from tests.engine.fixtures import path

CONFIG = EngineConfig.from_options({"model": path("llama-awq-g64"), "max_model_len": 64, "device": "cpu"})


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker(Platform(Target(torch.device("cpu"), torch.float32)), CONFIG, open_model(CONFIG.load))
    made.load()
    yield made
    made.shutdown()


def test_orders_before_the_cache_is_there_are_refused_and_after_it_answered(worker: Worker) -> None:
    reader = StepReader()
    with pytest.raises(EngineDeadError):
        _follow(Check(), worker, reader, answers=True)
    worker.allocate(worker.plan())
    assert _follow(Check(), worker, reader, answers=True) == Done()
    start = Start(CONFIG, worker.plan(), 0, "/nowhere", "info", False)
    with pytest.raises(ProtocolError, match="unexpected message Start"):
        _follow(start, worker, reader, answers=True)


def test_broken_blocks_are_cleaned_in_every_layer_and_sound_ones_kept(worker: Worker) -> None:
    worker.allocate(worker.plan())
    layers = worker.runner.cache.layers
    for layer in layers:
        layer.keys[1:4] = 1.0
        layer.values[1:4] = 1.0
    layers[1].values[2].view(-1)[5] = torch.nan
    assert _follow(Clear((1, 2)), worker, StepReader(), answers=False) is None
    for layer in layers:
        assert bool((layer.keys[2] == 0).all() and (layer.values[2] == 0).all())
        assert bool((layer.keys[[1, 3]] == 1).all() and (layer.values[[1, 3]] == 1).all())


def test_weights_count_once_when_it_is_planned_again(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    before, extra = worker.plan(), 2**20
    monkeypatch.setattr(Worker, "weight_bytes", property(lambda made: before.cards[0].weight_bytes + extra))
    # They are in place now, and what is free has shrunk to nearly nothing.
    monkeypatch.setattr(platform, "available_memory", lambda: 2**20)
    [card] = worker.plan().cards
    assert card.total_bytes == before.cards[0].total_bytes
    assert card.free_bytes == before.cards[0].free_bytes - extra


@pytest.mark.parametrize("samples", [True, False])
def test_only_the_rank_that_samples_says_that_one_token_answers_all(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, *, samples: bool
) -> None:
    monkeypatch.setattr(Links, "samples", property(lambda links: samples))
    monkeypatch.setattr(worker_module, "examine", lambda *args, **limits: Findings(None, 7))
    worker.allocate(worker.plan())
    with caplog.at_level("WARNING", logger="qengine"):
        worker.warm_up(worker.plan())
    assert ("7" in caplog.text) == samples


def test_a_worker_that_was_shut_down_says_so(worker: Worker) -> None:
    worker.allocate(worker.plan())
    worker.shutdown()
    worker.shutdown()
    with pytest.raises(EngineDeadError, match="released"):
        worker.check()
