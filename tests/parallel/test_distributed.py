"""Tensors over gloo: every call of `Transport`, between ranks that are threads, and no wait without an end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TypeVar

import pytest
import torch
import torch.distributed as dist

from qengine.errors import TransportError
from qengine.parallel.distributed import DistTransport, connect
from qengine.parallel.group import TPGroup
from tests.models.in_memory import Sequences
from tests.parallel.test_ranks import TinySource, prompts, tiny, tolerance

LIMIT_S = 60.0
T = TypeVar("T")

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of torch has no gloo")


def on_gloo(size: int, work: Callable[[DistTransport], T]) -> list[T]:
    """work(transport) of every rank at once."""
    store = dist.HashStore()

    def run(rank: int) -> T:
        transport = connect("gloo", dist.PrefixStore("ranks", store), rank, size, LIMIT_S)
        try:
            return work(transport)
        finally:
            transport.close()

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sums(size: int, dtype: torch.dtype) -> None:
    parts = [torch.randn(5, 33, generator=torch.Generator().manual_seed(rank)).to(dtype) for rank in range(size)]

    def work(transport: DistTransport) -> torch.Tensor:
        x = parts[transport.rank].clone()
        assert transport.all_reduce(x) is x
        return x

    sums = on_gloo(size, work)
    expected = torch.stack([part.double() for part in parts]).sum(0)
    # A 16-bit sum may be rounded once for each part.
    allowed = size * torch.finfo(dtype).eps * torch.stack(parts).double().abs().sum(0)
    assert ((sums[0].double() - expected).abs() <= allowed).all()
    assert all(torch.equal(other, sums[0]) for other in sums)


def test_parts_of_unlike_widths_side_by_side() -> None:
    widths = [64, 64, 33]
    parts = [torch.randn(4, width) for width in widths]
    for whole in on_gloo(3, lambda transport: transport.all_gather(parts[transport.rank], widths)):
        assert torch.equal(whole, torch.cat(parts, dim=1))


def test_a_tensor_goes_down_a_pipeline() -> None:
    sent = torch.randn(3, 8)

    def work(transport: DistTransport) -> torch.Tensor:
        x = sent.clone() if transport.rank == 0 else transport.receive(torch.zeros(3, 8), transport.rank - 1)
        if transport.rank < transport.size - 1:
            transport.send(x, transport.rank + 1)
            x.zero_()  # It may be reused at once.
        return x

    assert torch.equal(on_gloo(3, work)[-1], sent)


def test_a_stalled_rank_is_noticed_and_ends_the_transport() -> None:
    over = threading.Event()

    def work(transport: DistTransport) -> str:
        if transport.rank == 1:
            over.wait(LIMIT_S)
            return ""
        try:
            begin = time.monotonic()
            transport._limit = timedelta(seconds=1.0)  # They have met by now, which may take longer.
            with pytest.raises(TransportError, match="receive from rank 1 failed on rank 0 of ranks 0, 1") as first:
                transport.receive(torch.zeros(3), 1)
            assert first.value.rank == 1
            assert time.monotonic() - begin < LIMIT_S / 2
            with pytest.raises(TransportError, match="cannot be used any more: receive from rank 1 failed") as second:
                transport.all_reduce(torch.zeros(3))
        finally:
            over.set()
        return str(second.value)

    assert on_gloo(2, work)[0]


def test_a_rank_that_has_gone_is_noticed_before_the_limit() -> None:
    def work(transport: DistTransport) -> None:
        transport.all_reduce(torch.zeros(1))
        if transport.rank == 0:
            begin = time.monotonic()
            with pytest.raises(TransportError, match="all_reduce failed on rank 0 of ranks 0, 1"):
                transport.all_reduce(torch.zeros(3))
            assert time.monotonic() - begin < LIMIT_S / 2

    on_gloo(2, work)


def test_a_rank_that_does_not_come() -> None:
    with pytest.raises(TransportError, match="rank 4 of ranks 4, 6 cannot meet the others over gloo"):
        connect("gloo", dist.PrefixStore("alone", dist.HashStore()), 0, 2, 0.5, names=(4, 6))


def test_a_closed_transport_refuses() -> None:
    transport = connect("gloo", dist.PrefixStore("one", dist.HashStore()), 0, 1, LIMIT_S)
    assert torch.equal(transport.all_reduce(torch.ones(2)), torch.ones(2))
    transport.close()
    transport.close()
    with pytest.raises(TransportError, match="cannot be used any more: it is closed"):
        transport.all_reduce(torch.ones(2))


@pytest.mark.skipif(dist.is_nccl_available(), reason="this build has NCCL")
def test_no_nccl_is_said_plainly() -> None:
    with pytest.raises(TransportError, match="this build of torch has no NCCL"):
        connect("nccl", dist.PrefixStore("none", dist.HashStore()), 0, 1, LIMIT_S)


def test_a_model_on_two_ranks() -> None:
    source = TinySource(tiny(107 * 32, num_layers=2), 32, act_order=True)
    split = source.split(2)

    def work(transport: DistTransport) -> dict[str, torch.Tensor]:
        model = Sequences(source.build(TPGroup(transport, split)))
        return model.step(prompts())

    wanted = Sequences(source.build()).step(prompts())
    first, second = on_gloo(2, work)
    for name, logits in wanted.items():
        assert torch.equal(first[name], second[name])
        assert (first[name] - logits).abs().max() < tolerance(source.config, logits)
