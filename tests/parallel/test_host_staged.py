"""Tensors through host memory: right, the same bits everywhere, and an error in time when a rank is gone or stalled."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from qengine.errors import TransportError
from qengine.parallel.host_staged import SLICED_BYTES, HostStagedTransport
from qengine.parallel.seats import Seat, Seats, chain, shared_bytes
from qengine.parallel.signals import Call, Message, Signals
from tests.parallel.exchanges import DTYPES, check_sum, inputs_of

T = TypeVar("T")
#: Longer than anything takes on a busy machine, so that a test that reaches it has hung.
PATIENCE_S = 120.0
SMALL_SLOT = 4096


def own(seat: Seat) -> Seat:
    """The seat with descriptors of its own, as a process that inherits them has."""
    return dataclasses.replace(
        seat, memory_fd=os.dup(seat.memory_fd), peer_fds=tuple(fd if fd < 0 else os.dup(fd) for fd in seat.peer_fds)
    )


@contextlib.contextmanager
def ranks(
    size: int, *, slot_bytes: int = SMALL_SLOT, limit_s: float = PATIENCE_S
) -> Iterator[list[HostStagedTransport]]:
    """Transports of all ranks, for threads of this process; any may send to any other."""
    with Seats(size, list(itertools.permutations(range(size), 2)), slot_bytes) as seats:
        transports = [HostStagedTransport(own(seat), limit_s) for seat in seats]
    try:
        yield transports
    finally:
        for transport in transports:
            transport.close()


def on_all(transports: Sequence[HostStagedTransport], work: Callable[[HostStagedTransport], T]) -> list[T]:
    """What each rank's work gives, all at the same time; the first error of a rank is raised."""
    with ThreadPoolExecutor(len(transports)) as threads:
        return list(threads.map(work, transports))


def errors_of_all(
    transports: Sequence[HostStagedTransport], work: Callable[[HostStagedTransport], object]
) -> list[TransportError]:
    def fail(transport: HostStagedTransport) -> TransportError:
        with pytest.raises(TransportError) as caught:
            work(transport)
        return caught.value

    return on_all(transports, fail)


def same_bits(tensors: Sequence[torch.Tensor]) -> bool:
    return len({tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors}) == 1


# What is computed


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_reduce_sums_and_is_the_same_everywhere(size: int, dtype: torch.dtype) -> None:
    with ranks(size) as transports:
        for count in (0, 1, 7, 511, SMALL_SLOT // dtype.itemsize, 20_001):
            parts = inputs_of(size, (count,), dtype, seed=count)
            mine = [part.clone() for part in parts]
            sums = on_all(transports, lambda t, mine=mine: t.all_reduce(mine[t.rank]))
            assert all(found is x for found, x in zip(sums, mine, strict=True)), "x itself is returned"
            assert same_bits(sums)
            check_sum(sums[0], parts)


@pytest.mark.parametrize("size", [3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slices_give_what_whole_sums_give(size: int, dtype: torch.dtype) -> None:
    count = SLICED_BYTES // dtype.itemsize + 5
    parts = inputs_of(size, (count,), dtype)
    with ranks(size, slot_bytes=2 * SLICED_BYTES) as transports:
        sliced = on_all(transports, lambda t: t.all_reduce(parts[t.rank].clone()))
    with ranks(size, slot_bytes=SMALL_SLOT) as transports:
        whole = on_all(transports, lambda t: t.all_reduce(parts[t.rank].clone()))
    assert same_bits([*sliced, *whole])
    check_sum(sliced[0], parts)


def test_16_bit_parts_are_rounded_once() -> None:
    # 256 + 1 is a tie in bfloat16 and goes to 256; rounded after each addition, both ones would be lost.
    parts = [torch.tensor([value], dtype=torch.bfloat16) for value in (256.0, 1.0, 1.0)]
    with ranks(3) as transports:
        sums = on_all(transports, lambda t: t.all_reduce(parts[t.rank].clone()))
    assert [float(x) for x in sums] == [258.0] * 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", [(3, 3), (5, 2), (0, 4), (700, 2500), (2, 9, 4), (1500, 0, 1)], ids=str)
def test_all_gather_puts_parts_side_by_side(widths: tuple[int, ...], dtype: torch.dtype) -> None:
    with ranks(len(widths)) as transports:
        for num_rows in (0, 1, 13):
            whole = inputs_of(1, (num_rows, sum(widths)), dtype)[0]
            parts = whole.split(list(widths), dim=1)
            found = on_all(transports, lambda t, parts=parts: t.all_gather(parts[t.rank], widths))
            assert all(torch.equal(x, whole) for x in found)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool, torch.float8_e4m3fn], ids=str)
def test_what_is_sent_is_received(dtype: torch.dtype) -> None:
    def work(transport: HostStagedTransport) -> list[torch.Tensor]:
        found = []
        for count in (0, 1, 1000, 9 * SMALL_SLOT + 3):
            x = (torch.arange(count) % 2).to(dtype)
            if transport.rank == 2:
                transport.send(x, to=0)
                x.zero_()
            elif transport.rank == 0:
                found += [transport.receive(torch.empty(count, dtype=dtype), source=2), x]
        return found

    with ranks(3) as transports:
        found, *_ = on_all(transports, work)
    pairs = list(zip(found[::2], found[1::2], strict=True))
    assert len(pairs) == 4
    assert all(same_bits(pair) for pair in pairs)


def test_columns_of_a_matrix_are_handed_over_in_place() -> None:
    matrices = inputs_of(2, (40, 60), torch.float32)
    expected = matrices[0][:, 10:50] + matrices[1][:, 10:50]

    def work(transport: HostStagedTransport) -> torch.Tensor:
        matrix = matrices[transport.rank].clone()
        transport.all_reduce(matrix[:, 10:50])
        if transport.rank == 0:
            transport.send(matrix[:, 10:50], to=1)
        else:
            transport.receive(matrix[:, :40], source=0)
        return matrix

    with ranks(2) as transports:
        first, second = on_all(transports, work)
    assert torch.equal(first[:, 10:50], expected)
    assert torch.equal(first[:, :10], matrices[0][:, :10])
    assert torch.equal(second[:, :40], expected)


@pytest.mark.parametrize("size", [2, 3])
def test_a_random_walk_of_calls_by_ranks_of_unlike_speed(size: int) -> None:
    """Slots are used again and again while others still read: a sum that mixes two calls would show."""
    script = random.Random(size)
    calls = [(script.choice(["reduce", "gather", "send"]), script.choice([1, 300, 3000])) for _ in range(200)]

    def work(transport: HostStagedTransport) -> None:
        pauses = random.Random(transport.rank)
        for number, (call, count) in enumerate(calls):
            if pauses.random() < 0.2:
                time.sleep(pauses.random() * 2e-3)
            parts = inputs_of(size, (1, count), torch.float32, seed=number)
            x = parts[transport.rank].clone()
            if call == "reduce":
                check_sum(transport.all_reduce(x), parts)
            elif call == "gather":
                assert torch.equal(transport.all_gather(x, [count] * size), torch.cat(parts, dim=1))
            else:
                source = number % size
                if transport.rank == source:
                    transport.send(x, to=(source + 1) % size)
                elif transport.rank == (source + 1) % size:
                    assert torch.equal(transport.receive(torch.empty_like(x), source), parts[source])

    with ranks(size) as transports:
        on_all(transports, work)


def test_only_pairs_that_send_have_mailboxes() -> None:
    """Ranks that share layers have none; those of a pipeline have one for each that hands on to the next."""
    assert chain(4) == ((0, 1), (1, 2), (2, 3))
    for size, pairs, num_slots in ((3, (), 6), (3, chain(3), 10), (2, chain(2), 6)):
        with Seats(size, pairs) as seats:
            for seat in seats:
                assert Seat.from_text(seat.to_text()) == seat
                assert seat.num_slots == num_slots
                assert os.fstat(seat.memory_fd).st_size == seat.memory_bytes == shared_bytes(size, pairs)


def test_stages_hand_on_in_a_chain_and_nowhere_else() -> None:
    def work(transport: HostStagedTransport) -> float:
        x = torch.zeros(SMALL_SLOT)
        if transport.rank > 0:
            transport.receive(x, transport.rank - 1)
        if transport.rank < 2:
            transport.send(x + 1, transport.rank + 1)
        return float(x.sum()) / SMALL_SLOT

    with Seats(3, chain(3), SMALL_SLOT) as seats:
        transports = [HostStagedTransport(own(seat), PATIENCE_S) for seat in seats]
    try:
        assert on_all(transports, work) == [0.0, 1.0, 2.0]
        with pytest.raises(AssertionError, match="without a mailbox from rank 2 to rank 0"):
            transports[2].send(torch.zeros(1), to=0)
    finally:
        for transport in transports:
            transport.close()


# What goes wrong


def test_ranks_in_different_calls_are_told() -> None:
    def work(transport: HostStagedTransport) -> None:
        if transport.rank == 0:
            transport.all_reduce(torch.zeros(8))
        else:
            transport.all_gather(torch.zeros(1, 8), [8, 8])

    with ranks(2) as transports:
        errors = errors_of_all(transports, work)
        assert any("same calls in the same order" in str(error) for error in errors)
        assert [error.rank for error in errors] == [1, 0]
        with pytest.raises(TransportError, match="cannot be used any more"):
            transports[0].all_reduce(torch.zeros(8))


@pytest.mark.parametrize("shapes", [(8, 9), (0, 1), (2000, 2001)], ids=str)
def test_sums_of_unlike_sizes_are_refused(shapes: tuple[int, int]) -> None:
    with ranks(2) as transports:
        errors = errors_of_all(transports, lambda t: t.all_reduce(torch.zeros(shapes[t.rank])))
    assert any("bytes" in str(error) for error in errors)


def test_sums_of_unlike_types_are_refused() -> None:
    dtypes = (torch.float16, torch.bfloat16)
    with ranks(2) as transports:
        errors = errors_of_all(transports, lambda t: t.all_reduce(torch.zeros(4, dtype=dtypes[t.rank])))
    assert any("element type" in str(error) for error in errors)


def test_a_peer_that_never_comes_is_named_after_the_limit() -> None:
    with ranks(3, limit_s=0.2) as transports:
        errors = errors_of_all([transports[0], transports[2]], lambda t: t.all_reduce(torch.zeros(4)))
    assert [error.rank for error in errors] == [1, 1]
    assert any("has not answered" in str(error) and "0.2 s" in str(error) for error in errors)


def test_a_sender_waits_for_a_receiver_only_so_long() -> None:
    with ranks(2, limit_s=0.2) as transports:
        sender, _ = transports
        sender.send(torch.zeros(2 * SMALL_SLOT // 4), to=1)
        with pytest.raises(TransportError, match=r"rank 1 has not answered rank 0 for 0\.2 s"):
            sender.send(torch.zeros(1), to=1)


def test_an_error_of_one_rank_reaches_all_with_its_name() -> None:
    def work(transport: HostStagedTransport) -> None:
        # Rank 2 fails before it signals: complex numbers have no place in a message.
        dtype = torch.complex64 if transport.rank == 2 else torch.float32
        transport.all_reduce(torch.zeros(4, dtype=dtype))

    with ranks(3) as transports, ThreadPoolExecutor(3) as threads:
        ends = [threads.submit(work, transport) for transport in transports]
        errors = [end.exception(PATIENCE_S) for end in ends]
    assert isinstance(errors[2], KeyError)
    assert [error.rank for error in errors[:2] if isinstance(error, TransportError)] == [2, 2]


def test_a_rank_that_closes_is_missed_at_once_and_closing_twice_is_no_error() -> None:
    with ranks(2) as transports:
        transports[1].close()
        transports[1].close()
        with pytest.raises(TransportError, match="rank 1 has ended") as caught:
            transports[0].all_reduce(torch.zeros(4))
        assert caught.value.rank == 1
        with pytest.raises(TransportError, match="it was closed"):
            transports[1].all_reduce(torch.zeros(4))


def test_errors_name_ranks_by_their_numbers_in_the_model() -> None:
    with Seats(2, chain(2), names=(2, 3)) as seats:
        first, second = (HostStagedTransport(own(Seat.from_text(seat.to_text())), 0.1) for seat in seats)
    with contextlib.closing(first), contextlib.closing(second):
        with pytest.raises(TransportError, match="rank 3 has not answered rank 2") as caught:
            first.receive(torch.zeros(1), source=1)
        assert caught.value.rank == 1
        with pytest.raises(TransportError, match="rank 2 has given up because of rank 3"):
            second.receive(torch.zeros(1), source=0)
        with pytest.raises(TransportError, match="the transport of rank 2 cannot be used any more"):
            first.all_reduce(torch.zeros(1))


@pytest.fixture
def left_behind() -> Iterator[Signals]:
    """The signals of rank 0, when rank 2 has ended because of rank 1 without reading what rank 0 sent to it."""
    with Seats(3) as seats:
        first, other, last = (Signals(own(seat), PATIENCE_S, 0.0) for seat in seats)
    first.tell(2, Message(Call.SEND, 0, 0, 7, 0))
    last.tell(0, Message(Call.SEND, 0, 2, 7, 0))
    last.tell_failed(1)
    last.close()
    yield first
    first.close()
    other.close()


def test_what_a_rank_said_before_it_ended_is_heard(left_behind: Signals) -> None:
    assert left_behind.hear(2, left_behind.deadline()).sequence == 7
    with pytest.raises(TransportError, match="rank 2 has given up because of rank 1") as caught:
        left_behind.hear(2, left_behind.deadline())
    assert caught.value.rank == 1
    with pytest.raises(TransportError, match="rank 2 has ended while rank 0 waits for it"):
        left_behind.hear(2, left_behind.deadline())


def test_who_tells_an_ended_rank_learns_why_it_ended(left_behind: Signals) -> None:
    with pytest.raises(TransportError, match="rank 2 has given up because of rank 1") as caught:
        left_behind.tell(2, Message(Call.SEND, 0, 0, 8, 0))
    assert caught.value.rank == 1


def test_seats_that_do_not_fit_are_refused_with_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    # A real refusal would first fill the machine's memory.
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    fds = open_descriptors()
    with pytest.raises(TransportError, match=r"6 MiB of host memory .* No space left"):
        Seats(2, chain(2), 2**20)
    assert open_descriptors() == fds


# Ranks in processes


class Processes:
    """Ranks as processes of `staged_rank`, gone when the block is left."""

    def __init__(self, size: int, task: str, limit_s: float) -> None:
        command = [sys.executable, "-m", "tests.parallel.staged_rank", task, str(limit_s)]
        with Seats(size) as seats:
            self._all = [
                subprocess.Popen(
                    [*command, seat.to_text()], pass_fds=seat.fds, stdin=subprocess.PIPE, stdout=subprocess.PIPE
                )
                for seat in seats
            ]

    def __enter__(self) -> Processes:
        for rank in range(len(self._all)):
            assert self.answer(rank) == {"ready": True}
        for process in self._all:
            assert process.stdin is not None
            process.stdin.write(b"go\n")
            process.stdin.flush()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._all:
            process.kill()
            process.communicate(timeout=PATIENCE_S)

    def answer(self, rank: int) -> dict[str, Any]:
        """The next line of a rank. It ends with the rank, and every rank's waits are limited."""
        output = self._all[rank].stdout
        assert output is not None
        record: dict[str, Any] = json.loads(output.readline())
        return record

    def send_signal(self, rank: int, number: signal.Signals) -> None:
        self._all[rank].send_signal(number)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("size", [2, 3])
def test_processes_get_the_same_bits(size: int) -> None:
    fds = open_descriptors()
    with Processes(size, "digests", PATIENCE_S) as processes:
        found = [processes.answer(rank) for rank in range(size)]
    assert len(found[0]) == 3 * len(DTYPES)
    assert all(other == found[0] for other in found)
    assert open_descriptors() == fds


def test_a_killed_rank_is_missed_at_once_and_leaves_nothing() -> None:
    shared = set(Path("/dev/shm").iterdir())
    # The limit is longer than the test waits for the other ranks: only the end of rank 1 can tell them.
    with Processes(3, "loop", 10 * PATIENCE_S) as processes:
        for rank in range(3):
            assert processes.answer(rank) == {"under_way": True}
        processes.send_signal(1, signal.SIGKILL)
        for rank in (0, 2):
            found = processes.answer(rank)
            assert found["rank"] == 1, found
    assert set(Path("/dev/shm").iterdir()) <= shared


def test_a_stopped_rank_is_named_after_the_limit() -> None:
    with Processes(3, "loop", 5.0) as processes:
        for rank in range(3):
            assert processes.answer(rank) == {"under_way": True}
        processes.send_signal(1, signal.SIGSTOP)
        found = [processes.answer(rank) for rank in (0, 2)]
    assert [record["rank"] for record in found] == [1, 1], found
    assert any("rank 1 has not answered" in record["error"] and "5 s" in record["error"] for record in found)
