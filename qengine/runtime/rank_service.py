"""One rank of a model, as a process that an engine has started: what `python -m qengine.runtime.rank` does.

It takes orders from a socket that it inherits, one after the other, and lives as long as the engine. Invariant: each
order is answered, or the answer is `Failed` with the reason, after which nothing more is done. Who started it decides
everything: it reads no flags.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import traceback
from collections.abc import Iterator
from typing import Literal

import torch

from qengine.errors import ConfigError, LoadError, StepMemoryError, TransportError
from qengine.imports import freeze_live_objects
from qengine.logs import set_up_logging
from qengine.runtime.channel import Channel, ChannelClosedError, ProtocolError
from qengine.runtime.links import Links, connect_links
from qengine.runtime.loader import OpenedModel, open_model
from qengine.runtime.messages import (
    WARM_UP_SECONDS,
    Alive,
    Allocate,
    Check,
    Clear,
    Done,
    Failed,
    Joined,
    Loaded,
    Opened,
    Order,
    Report,
    Spent,
    Start,
    Step,
    Stop,
    decode_order,
    encode,
)
from qengine.runtime.planner import Card
from qengine.runtime.platform import Platform, choose_device, choose_dtype, rank_device
from qengine.runtime.step_messages import StepReader, write_result
from qengine.runtime.worker import Worker

logger = logging.getLogger(__name__)

#: How often a rank that is busy with its start says so.
ALIVE_SECONDS = 1.0

#: The other ranks wait in the middle of the same step for what this one will not give them.
_NO_WAY_BACK = (
    "; ranks cannot take a step back. Start with a lower --gpu-memory-utilization or --max-num-batched-tokens"
)


def main(channel: Channel) -> int:
    """Serve the engine at the other end of `channel`. Returns the exit code."""
    try:
        _serve(channel)
    except ChannelClosedError:
        return 0
    except Exception as error:  # noqa: BLE001 - whatever it was, the engine must hear of it
        _report_failure(channel, error)
        return 1
    return 0


def _serve(channel: Channel) -> None:
    """Follow orders until `Stop`."""
    start = _expect_start(channel)
    config = start.config.parallel
    set_up_logging(start.log_level)
    device = rank_device(choose_device(start.config.load.device), start.rank)
    opened = open_model(start.config.load)
    _send(channel, Opened())
    links = _connect(start, opened, device)
    _send(channel, Joined())
    worker, card = _make_worker(start, opened, device, links)
    with _signs_of_life(channel):
        times = worker.load(show_progress=start.show_progress)
    if start.rank == 0:
        worker.log_kernels()
    _send(channel, Loaded(card, worker.weight_bytes, times))
    reader = StepReader()
    while not isinstance(order := decode_order(channel.receive()), Stop):
        if isinstance(order, Allocate):
            with _signs_of_life(channel):
                worker.allocate(order.plan)
                worker.warm_up(order.plan)
            freeze_live_objects()
            report: Report | None = Done()
        else:
            spent_before = links.collective_seconds
            report = _follow(order, worker, reader, answers=start.rank == config.answering_rank)
            if isinstance(order, Step):
                _tell_collectives(channel, spent_before, links.collective_seconds)
        if report is not None:
            _send(channel, report)
    # Not after a failure: to be left without a word, the others would say that first.
    worker.shutdown()


def _expect_start(channel: Channel) -> Start:
    order = decode_order(channel.receive())
    if not isinstance(order, Start):
        raise ProtocolError(f"the first message is {type(order).__name__}, expected Start")
    return order


def _connect(start: Start, opened: OpenedModel, device: torch.device) -> Links:
    parallel = start.config.parallel
    stage = start.rank // parallel.tensor_parallel_size
    layers, shares = start.plan.layers_of(stage), start.plan.shares_of(stage)
    limit_s = WARM_UP_SECONDS + parallel.step_timeout
    return connect_links(parallel, start.rank, opened, device, start.rendezvous, limit_s, layers, shares, start.seats)


def _make_worker(start: Start, opened: OpenedModel, device: torch.device, links: Links) -> tuple[Worker, Card | None]:
    config = start.config
    dtype = choose_dtype(config.load.dtype, device, opened.config.torch_dtype)
    # Steps that wait for other ranks are not recorded.
    platform = Platform.of(device, dtype, enforce_eager=True)
    card = platform.machine.cards[0] if device.type == "cuda" else None
    return Worker(platform, config, opened, start.plan, links, rank=start.rank), card


@contextlib.contextmanager
def _signs_of_life(channel: Channel) -> Iterator[None]:
    """Say `Alive` again and again while the block runs, which must not use the channel."""
    is_over = threading.Event()

    def speak() -> None:
        with contextlib.suppress(ChannelClosedError):
            while not is_over.wait(ALIVE_SECONDS):
                _send(channel, Alive())

    thread = threading.Thread(target=speak, name="qengine-alive", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _follow(order: Order, worker: Worker, reader: StepReader, *, answers: bool) -> Report | None:
    """Do what an order says that comes once everything is in its place. Returns the answer if there is one."""
    if isinstance(order, Step):
        batch = reader.read(order)
        result = worker.step(batch)
        return write_result(batch, result) if answers else None
    if isinstance(order, Clear):
        worker.clear_not_finite(order.block_ids)
        return None
    if not isinstance(order, Check):
        raise ProtocolError(f"unexpected message {type(order).__name__}")
    worker.check()
    return Done()


def _tell_collectives(channel: Channel, before: float | None, after: float | None) -> None:
    if before is not None and after is not None:
        _send(channel, Spent(after - before))


def _send(channel: Channel, report: Report) -> None:
    channel.send(encode(report))


def _report_failure(channel: Channel, error: Exception) -> None:
    """Say why, and wait for the end: the engine decides what becomes of the ranks."""
    if isinstance(error, ConfigError):
        failed = Failed("config", str(error))
    elif isinstance(error, LoadError):
        failed = Failed("load", str(error))
    elif isinstance(error, StepMemoryError):
        failed = Failed("internal", f"out of memory in a step: {error}{_NO_WAY_BACK}")
    else:
        logger.error("%s", "".join(traceback.format_exception(error)).rstrip())
        kind: Literal["transport", "internal"] = "transport" if isinstance(error, TransportError) else "internal"
        failed = Failed(kind, f"{type(error).__name__}: {error}")
    try:
        _send(channel, failed)
        while True:
            channel.receive()
    except ChannelClosedError:
        return
