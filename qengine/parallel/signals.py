"""Signals: short messages between local ranks that say what lies ready in shared memory, with a limit on every wait.

They go over sockets, not through flags in the shared memory: the kernel orders memory around a system call on every
processor, a wait costs no time of a core, and the end of a rank is an event. A message names the call that its sender
is in, so ranks whose calls differ find out instead of mixing tensors. Invariant: every wait ends within its deadline,
and the error names the rank to blame. This module knows nothing of tensors.
"""

from __future__ import annotations

import contextlib
import enum
import math
import os
import select
import socket
import struct
import time
from collections import deque
from dataclasses import dataclass

from qengine.errors import TransportError
from qengine.parallel.seats import Seat

_LAYOUT = struct.Struct("<BBHIQ")
_MAX_MESSAGE = 64


class Call(enum.IntEnum):
    """What a message is about."""

    ALL_REDUCE = 1
    ALL_GATHER = 2
    SEND = 3
    #: The receiver has copied what was sent.
    TAKEN = 4
    #: The sender has given up; `rank` is to blame.
    FAILED = 5


@dataclass(frozen=True, slots=True)
class Message:
    """One signal.

    Attributes:
        dtype: a number for the kind of elements.
        rank: of the sender, or the one to blame.
        sequence: which call of its kind this is.
        num_bytes: that lie ready.
    """

    call: Call
    dtype: int
    rank: int
    sequence: int
    num_bytes: int

    def pack(self) -> bytes:
        return _LAYOUT.pack(self.call, self.dtype, self.rank, self.sequence & 0xFFFFFFFF, self.num_bytes)

    @staticmethod
    def unpack(data: bytes) -> Message:
        call, *rest = _LAYOUT.unpack(data)
        return Message(Call(call), *rest)

    def __str__(self) -> str:
        name = self.call.name.lower()
        return f"{name} {self.sequence} of {self.num_bytes} bytes, element type {self.dtype}"


class Signals:
    """One rank's sockets to all others. For one thread.

    Args:
        limit_s: the longest wait for a peer, in seconds.
        spin_s: how long to look again and again before sleeping. Every look offers the core to others.
    """

    def __init__(self, seat: Seat, limit_s: float, spin_s: float) -> None:
        assert limit_s > 0, "a wait without a limit may never end"
        self.limit_s = limit_s
        self._spin_ns = int(spin_s * 1e9)
        self._names = seat.names
        self._own = seat.names[seat.rank]
        self._sockets = {rank: socket.socket(fileno=fd) for rank, fd in enumerate(seat.peer_fds) if fd >= 0}
        self._polls = {rank: select.poll() for rank in self._sockets}
        self._early: dict[int, deque[Message]] = {rank: deque() for rank in self._sockets}
        self._num_taken = dict.fromkeys(self._sockets, 0)
        for rank, end in self._sockets.items():
            end.setblocking(False)
            self._polls[rank].register(end, select.POLLIN)

    @property
    def peers(self) -> tuple[int, ...]:
        """All other ranks, in order."""
        return tuple(self._sockets)

    def deadline(self) -> float:
        """When a wait that begins now must end."""
        return time.monotonic() + self.limit_s

    def tell(self, peer: int, message: Message) -> None:
        """Send one message.

        Raises:
            TransportError: if the peer has ended or does not read any more.
        """
        try:
            self._sockets[peer].send(message.pack())
        except BlockingIOError:
            raise self._stalled(peer) from None
        except OSError:
            raise self._ended(peer) from None

    def tell_all(self, message: Message) -> None:
        """Send one message to every peer."""
        for peer in self._sockets:
            self.tell(peer, message)

    def tell_taken(self, peer: int, message: Message) -> None:
        """Send a receipt; a sender that has ended needs none."""
        with contextlib.suppress(OSError):
            self._sockets[peer].send(message.pack())

    def tell_failed(self, culprit: int) -> None:
        """Tell whoever still listens that this rank gives up, and because of whom."""
        message = Message(Call.FAILED, 0, culprit, 0, 0).pack()
        for end in self._sockets.values():
            with contextlib.suppress(OSError):
                end.send(message)

    def hear(self, peer: int, deadline: float) -> Message:
        """The next message of a peer; receipts are counted aside.

        Raises:
            TransportError: if the peer has ended or given up, or nothing comes until the deadline.
        """
        if self._early[peer]:
            return self._early[peer].popleft()
        while True:
            message = self._next(peer, deadline)
            if message.call is not Call.TAKEN:
                return message
            self._num_taken[peer] += 1

    def wait_taken(self, peer: int, number: int, deadline: float) -> None:
        """Wait until a peer has taken `number` of what was ever sent to it; raises as `hear`."""
        while self._num_taken[peer] < number:
            message = self._next(peer, deadline)
            if message.call is Call.TAKEN:
                self._num_taken[peer] += 1
            else:
                self._early[peer].append(message)

    def close(self) -> None:
        """Close all sockets: the peers see that this rank has ended. Idempotent."""
        for end in self._sockets.values():
            end.close()

    def _next(self, peer: int, deadline: float) -> Message:
        poll = self._polls[peer]
        if not self._spin(poll) and not poll.poll(max(0, math.ceil((deadline - time.monotonic()) * 1000))):
            raise self._stalled(peer)
        message = self._read(peer)
        if message is None:
            raise TransportError(f"rank {self._names[peer]} has ended while rank {self._own} waits for it", rank=peer)
        if message.call is Call.FAILED:
            raise self._gave_up(peer, message)
        return message

    def _spin(self, poll: select.poll) -> bool:
        """Whether something comes soon. Whoever else is ready to run on this core goes first."""
        if poll.poll(0):
            return True
        end = time.monotonic_ns() + self._spin_ns
        while time.monotonic_ns() < end:
            os.sched_yield()
            if poll.poll(0):
                return True
        return False

    def _read(self, peer: int) -> Message | None:
        """The next message of a peer, also of one that has ended; None where it has ended and said nothing more.

        Raises:
            BlockingIOError: nothing is there yet.
        """
        end = self._sockets[peer]
        try:
            data = end.recv(_MAX_MESSAGE)
        except ConnectionError:
            # A peer that ends with messages unread resets the socket, once, ahead of what it had sent.
            data = end.recv(_MAX_MESSAGE)
        return Message.unpack(data) if data else None

    def _stalled(self, peer: int) -> TransportError:
        return TransportError(
            f"rank {self._names[peer]} has not answered rank {self._own} for {self.limit_s:g} s: it is stalled, "
            "or it is computing something that takes longer than the limit",
            rank=peer,
        )

    def _gave_up(self, peer: int, message: Message) -> TransportError:
        blame = "an error of its own" if message.rank == peer else f"rank {self._names[message.rank]}"
        return TransportError(f"rank {self._names[peer]} has given up because of {blame}", rank=message.rank)

    def _ended(self, peer: int) -> TransportError:
        """Why a peer no longer reads: what it said before it ended, if anything."""
        with contextlib.suppress(BlockingIOError):
            while (message := self._read(peer)) is not None:
                if message.call is Call.FAILED:
                    return self._gave_up(peer, message)
        return TransportError(
            f"rank {self._names[peer]} has ended; rank {self._own} cannot go on without it", rank=peer
        )
