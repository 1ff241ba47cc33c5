"""Ranks meet before they are needed."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from qengine.config import LoadConfig, ParallelConfig
from qengine.parallel.distributed import DistTransport
from qengine.runtime.links import connect_links
from qengine.runtime.loader import open_model
from tests.engine.fixtures import path


def test_all_that_will_ever_send_have_sent_when_links_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL connects a pair of ranks at its first send, and no step should wait for that."""
    real, lock, pairs = DistTransport.send, threading.Lock(), set[tuple[int, int]]()

    def send(self: DistTransport, x: torch.Tensor, to: int) -> None:
        with lock:
            pairs.add((self.rank, to))
        real(self, x, to)

    monkeypatch.setattr(DistTransport, "send", send)
    opened = open_model(LoadConfig(path("llama-awq-g64")))
    parallel = ParallelConfig(pipeline_parallel_size=3)

    def meet(rank: int) -> None:
        connect_links(parallel, rank, opened, torch.device("cpu"), str(tmp_path / "meeting"), 30.0).close()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(meet, range(3)))
    assert pairs == {(0, 1), (1, 2)}
