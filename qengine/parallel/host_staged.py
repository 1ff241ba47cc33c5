"""HostStagedTransport: tensors between local ranks through host memory, for cards that must not touch each other's.

Every rank copies its part into its own slot of a shared memory, signals, and reads the slots of the others. A GPU
copies to and from the slots directly, since they are pinned. NCCL is not needed, so two ranks may share one GPU too.

Invariant: all ranks end an all_reduce with the same bits. Parts are added in the order of ranks, 16-bit ones in 32 bits
with one rounding at the end. Slots exist twice. A rank that writes half h again has heard, since it wrote h last, the
signal of every peer for the other half, which each sent after it had read h: so nobody's slot is overwritten under a
reader, and one round of signals per exchange is enough.

What it does not do: overlap copies with computing, or run inside a recorded CUDA graph, since it waits on the host.
"""

from __future__ import annotations

import itertools
import logging
import mmap
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from qengine.errors import TransportError
from qengine.parallel.seats import NUM_HALVES, Pair, Seat
from qengine.parallel.signals import Call, Message, Signals

logger = logging.getLogger(__name__)

#: Seconds to wait for a peer before it counts as stalled.
DEFAULT_LIMIT_S = 60.0
#: Ranks come to a collective within microseconds of each other; sleeping and being woken takes longer than this.
DEFAULT_SPIN_S = 100e-6
#: From here on three or more ranks each add up one slice, rather than everyone everything.
SLICED_BYTES = 64 * 2**10
#: Element types by the number that signals carry. Only the ends matter: all ranks run the same version.
_DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool),
)
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}
_16_BIT_FLOATS = (torch.float16, torch.bfloat16)


class _AllOrNothing:
    """Guards calls. One that fails leaves ranks at different places: peers are told, and no other call begins."""

    def __init__(self, seat: Seat, signals: Signals) -> None:
        self.dead: str | None = None
        self._rank = seat.rank
        self._name = seat.names[seat.rank]
        self._signals = signals

    def __enter__(self) -> None:
        if self.dead is not None:
            raise TransportError(f"the transport of rank {self._name} cannot be used any more: {self.dead}")

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.dead = str(error) or type(error).__name__
            culprit = error.rank if isinstance(error, TransportError) else None
            self._signals.tell_failed(self._rank if culprit is None else culprit)


class HostStagedTransport:
    """A `Transport` between local ranks. For one thread, and on a GPU for one stream.

    Args:
        seat: this rank's place; its descriptors are taken over.
        limit_s: the longest wait for a peer, in seconds; a call that takes longer raises TransportError.
        spin_s: how long to look for a peer's signal before sleeping, in seconds.
    """

    def __init__(self, seat: Seat, limit_s: float = DEFAULT_LIMIT_S, spin_s: float = DEFAULT_SPIN_S) -> None:
        self._rank = seat.rank
        self._names = seat.names
        self._own = seat.names[seat.rank]
        self._size = seat.size
        self._slot_bytes = seat.slot_bytes
        self._signals = Signals(seat, limit_s, spin_s)
        self._memory = torch.frombuffer(mmap.mmap(seat.memory_fd, seat.memory_bytes), dtype=torch.uint8)
        os.close(seat.memory_fd)
        slots = self._memory.view(NUM_HALVES, -1, seat.slot_bytes)
        self._slots = [list(half[: seat.size]) for half in slots]
        self._mailboxes = [dict(zip(seat.pairs, half[seat.size :], strict=True)) for half in slots]
        self._num_exchanges = 0
        self._num_sent = [0] * seat.size
        self._num_received = [0] * seat.size
        self._guard = _AllOrNothing(seat, self._signals)
        self._stream: torch.cuda.Stream | None = None

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._size

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of x of any shape, the same bits on every rank; x is overwritten and returned.

        Raises:
            TransportError: if a peer is stalled, has ended or is in another call. The transport is dead then.
        """
        with self._guard:
            flat = x.contiguous().view(-1)
            for piece in _pieces(flat, self._slot_bytes):
                if self._size > 2 and piece.numel() * piece.element_size() >= SLICED_BYTES:
                    self._reduce_in_slices(piece)
                else:
                    self._reduce_whole(piece)
            return x if x.is_contiguous() else x.copy_(flat.view(x.shape))

    def all_gather(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        """x [rows, widths[rank]] of every rank, side by side: [rows, sum(widths)]; raises as `all_reduce`."""
        assert x.dim() == 2, f"x has {x.dim()} dimensions, expected rows and columns"
        assert len(widths) == self._size, f"{len(widths)} widths for {self._size} ranks"
        assert x.shape[1] == widths[self._rank], f"x has {x.shape[1]} columns, expected {widths[self._rank]}"
        ends = list(itertools.accumulate(widths))
        with self._guard:
            out = x.new_empty(x.shape[0], ends[-1])
            columns = [out[:, end - width : end] for end, width in zip(ends, widths, strict=True)]
            for rows, cut in _tiles(x.shape[0], max(widths), self._slot_bytes // x.element_size()):
                targets = [column[rows, cut] for column in columns]
                parts = self._exchange(Call.ALL_GATHER, x[rows, cut], [target.numel() for target in targets])
                for target, part in zip(targets, parts, strict=True):
                    target.copy_(part.view(target.shape), non_blocking=True)
            return out

    def send(self, x: torch.Tensor, to: int) -> None:
        """Hand x to a rank that receives it; returns when x is copied, which may be before it has arrived.

        Seats must have been made with a mailbox for the two.

        Raises:
            TransportError: if the peer is stalled or has ended. The transport is dead then.
        """
        with self._guard:
            for piece in _pieces(x.contiguous().view(-1), self._slot_bytes):
                number = self._num_sent[to]
                self._signals.wait_taken(to, number - NUM_HALVES + 1, self._signals.deadline())
                self._write(self._mailbox(self._rank, to, number), piece)
                self._signals.tell(to, self._message(Call.SEND, piece.dtype, number, piece.numel()))
                self._num_sent[to] += 1

    def receive(self, x: torch.Tensor, source: int) -> torch.Tensor:
        """Fill x from a rank that sends as many elements of the same type; returns x. Raises as `all_reduce`."""
        with self._guard:
            flat = x if x.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format)
            for piece in _pieces(flat.view(-1), self._slot_bytes):
                number = self._num_received[source]
                expected = self._message(Call.SEND, piece.dtype, number, piece.numel())
                self._expect(source, expected, self._signals.deadline())
                self._read(self._mailbox(source, self._rank, number), piece)
                self._signals.tell_taken(source, self._message(Call.TAKEN, piece.dtype, number, 0))
                self._num_received[source] += 1
            return x if flat is x else x.copy_(flat)

    def close(self) -> None:
        """Release sockets and memory. Idempotent."""
        if self._stream is not None:
            self._stream.synchronize()
            _cudart().cudaHostUnregister(self._memory.data_ptr())
            self._stream = None
        self._guard.dead = self._guard.dead or "it was closed"
        self._signals.close()
        self._slots, self._mailboxes = [], []
        self._memory = torch.empty(0, dtype=torch.uint8)

    def _mailbox(self, source: int, to: int, number: int) -> torch.Tensor:
        mailboxes: dict[Pair, torch.Tensor] = self._mailboxes[number % NUM_HALVES]
        assert (source, to) in mailboxes, f"seats were made without a mailbox from rank {source} to rank {to}"
        return mailboxes[source, to]

    def _reduce_whole(self, x: torch.Tensor) -> None:
        """Everyone adds up everything: one exchange."""
        parts = self._exchange(Call.ALL_REDUCE, x, [x.numel()] * self._size)
        # What this rank has written it need not fetch.
        parts[self._rank] = x
        _add_up(parts, out=x)

    def _reduce_in_slices(self, x: torch.Tensor) -> None:
        """Everyone adds up one slice and hands it on: two exchanges, and less to move where there are many ranks."""
        bounds = [x.numel() * rank // self._size for rank in range(self._size + 1)]
        slices = [slice(low, high) for low, high in itertools.pairwise(bounds)]
        own = slices[self._rank]
        parts = [part[own] for part in self._exchange(Call.ALL_REDUCE, x, [x.numel()] * self._size)]
        parts[self._rank] = x[own]
        _add_up(parts, out=x[own])
        sums = self._exchange(Call.ALL_REDUCE, x[own], [x[part].numel() for part in slices])
        for rank, part in enumerate(slices):
            if rank != self._rank:
                x[part].copy_(sums[rank], non_blocking=True)

    def _exchange(self, call: Call, x: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor]:
        """Hand x to all, and get the parts of all ranks [counts[rank]], which lie in host memory.

        They are valid until the exchange after the next one.
        """
        slots = self._slots[self._num_exchanges % NUM_HALVES]
        self._write(slots[self._rank], x)
        messages = [self._message(call, x.dtype, self._num_exchanges, count) for count in counts]
        self._signals.tell_all(messages[self._rank])
        deadline = self._signals.deadline()
        for peer in self._signals.peers:
            self._expect(peer, messages[peer], deadline)
        self._num_exchanges += 1
        return [_view(slot, x.dtype, count) for slot, count in zip(slots, counts, strict=True)]

    def _expect(self, peer: int, expected: Message, deadline: float) -> None:
        found = self._signals.hear(peer, deadline)
        found_call = (found.call, found.dtype, found.sequence, found.num_bytes)
        if found_call != (expected.call, expected.dtype, expected.sequence, expected.num_bytes):
            raise TransportError(
                f"rank {self._names[peer]} is in {found}, but rank {self._own} expects {expected} from it: "
                "ranks must make the same calls in the same order",
                rank=peer,
            )

    def _message(self, call: Call, dtype: torch.dtype, number: int, count: int) -> Message:
        return Message(call, _CODES[dtype], self._rank, number & 0xFFFFFFFF, count * dtype.itemsize)

    def _write(self, slot: torch.Tensor, x: torch.Tensor) -> None:
        """Copy x into a slot, and wait until it is there and all earlier reads of slots are done."""
        if x.is_cuda:
            self._prepare_for_gpu(x.device)
        _view(slot, x.dtype, x.numel()).view(x.shape).copy_(x, non_blocking=True)
        self._finish_copies()

    def _read(self, slot: torch.Tensor, x: torch.Tensor) -> None:
        """Fill x from a slot, and wait until it is there."""
        if x.is_cuda:
            self._prepare_for_gpu(x.device)
        x.copy_(_view(slot, x.dtype, x.numel()), non_blocking=True)
        self._finish_copies()

    def _prepare_for_gpu(self, device: torch.device) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise TransportError("host-staged collectives cannot be recorded in a CUDA graph; use --enforce-eager")
        if self._stream is None:
            code = _cudart().cudaHostRegister(self._memory.data_ptr(), self._memory.numel(), 0)
            if int(code) != 0:
                logger.warning("host memory between ranks cannot be pinned (%s); copies will be slower", code)
        self._stream = torch.cuda.current_stream(device)

    def _finish_copies(self) -> None:
        """Wait for the GPU's copies, those of earlier calls included."""
        if self._stream is not None:
            self._stream.synchronize()


def _cudart() -> Any:
    """CUDA's runtime."""
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _pieces(flat: torch.Tensor, max_bytes: int) -> Iterator[torch.Tensor]:
    """Parts of a vector that each fit into `max_bytes`; at least one, which may be empty."""
    step = max_bytes // flat.element_size()
    for begin in range(0, max(flat.numel(), 1), step):
        yield flat[begin : begin + step]


def _view(slot: torch.Tensor, dtype: torch.dtype, count: int) -> torch.Tensor:
    """The first `count` elements of a slot [bytes]."""
    return slot[: count * dtype.itemsize].view(dtype)


def _add_up(parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """The sum of parts, in their order, on out's device. out may be one of them."""
    here = (part if part.device == out.device else part.to(out.device, non_blocking=True) for part in parts)
    if len(parts) == 2:
        # One addition rounds once, whatever the type.
        torch.add(*here, out=out)
        return
    wide = torch.float32 if out.dtype in _16_BIT_FLOATS else out.dtype
    total = next(here).to(wide, copy=True)
    for part in here:
        total.add_(part)
    out.copy_(total)


def _tiles(num_rows: int, width: int, capacity: int) -> Iterator[tuple[slice, slice]]:
    """(rows, columns) of the parts of a matrix that each have at most `capacity` elements; at least one part."""
    columns = min(max(width, 1), capacity)
    rows = capacity // columns
    for left in range(0, max(width, 1), columns):
        for top in range(0, max(num_rows, 1), rows):
            yield slice(top, top + rows), slice(left, left + columns)
