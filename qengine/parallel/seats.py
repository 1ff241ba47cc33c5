"""Seats: what each local rank inherits from the process that starts it, to reach the others through host memory.

A seat is the descriptors of one shared memory and of a socket to every other rank. None of them has a name: nothing can
be left in a file system, whoever is killed, and nobody else can open them. A socket ends when its rank does, so the
others notice at once. Every rank has a slot for its part of a sum; a mailbox is made only for pairs that send.

How to start ranks with them:

    with Seats(size) as seats:                      # or Seats(size, chain(size)), where each hands on to the next
        for seat in seats:
            subprocess.Popen([*command, seat.to_text()], pass_fds=seat.fds)
    # Leaving the block closes our copies: only then do ranks notice each other's end.

and in a rank: `HostStagedTransport(Seat.from_text(text))`, once. This module moves no data.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import mmap
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qengine.errors import TransportError

#: Bytes that a rank hands over at once; larger tensors go in parts.
DEFAULT_SLOT_BYTES = 2 * 2**20
#: Every slot exists twice: one is written while the other is read.
NUM_HALVES = 2
#: (from, to) of ranks that send and receive.
Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Seat:
    """One rank's place.

    Attributes:
        slot_bytes: of one slot, a multiple of the page size. `HostStagedTransport` says how slots are used.
        memory_fd: the shared memory.
        peer_fds: by rank, a socket to it; -1 for this rank itself.
        names: by rank, its number among all ranks of the model, of which these may be a few; errors say it.
        pairs: those that have a mailbox, in the order of their slots, which follow those of the ranks.
    """

    rank: int
    size: int
    slot_bytes: int
    memory_fd: int
    peer_fds: tuple[int, ...]
    names: tuple[int, ...]
    pairs: tuple[Pair, ...] = ()

    @property
    def fds(self) -> tuple[int, ...]:
        """All descriptors, for `subprocess.Popen(pass_fds=...)`."""
        return (self.memory_fd, *(fd for fd in self.peer_fds if fd >= 0))

    @property
    def num_slots(self) -> int:
        """One for each rank's part of a collective, one for each mailbox; all of them twice."""
        return _num_slots(self.size, self.pairs)

    @property
    def memory_bytes(self) -> int:
        """Size of the shared memory."""
        return self.num_slots * self.slot_bytes

    def to_text(self) -> str:
        """For a command line or a message."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @staticmethod
    def from_text(text: str) -> Seat:
        """The seat that was written. Its descriptors must have been inherited."""
        record = json.loads(text)
        pairs = tuple((source, target) for source, target in record["pairs"])
        return Seat(**{**record, **{key: tuple(record[key]) for key in ("peer_fds", "names")}, "pairs": pairs})


def chain(size: int) -> tuple[Pair, ...]:
    """The pairs of a pipeline, in which every rank hands on to the next."""
    return tuple(itertools.pairwise(range(size)))


def shared_bytes(size: int, pairs: Sequence[Pair] = ()) -> int:
    """Memory of `size` ranks that reach each other through it; nothing for one."""
    return _num_slots(size, pairs) * DEFAULT_SLOT_BYTES if size > 1 else 0


def _num_slots(size: int, pairs: Sequence[Pair]) -> int:
    return NUM_HALVES * (size + len(pairs))


class Seats:
    """The seats of all ranks, made in the process that starts them. Leaving the block closes this process's copies."""

    def __init__(
        self,
        size: int,
        pairs: Sequence[Pair] = (),
        slot_bytes: int = DEFAULT_SLOT_BYTES,
        names: Sequence[int] | None = None,
    ) -> None:
        """Allocate the memory and the sockets.

        Args:
            pairs: of ranks that send and receive; a rank sends to no other.
            names: by rank, its number among all ranks of the model; None where these are all of them.

        Raises:
            TransportError: if the machine has no room for them.
        """
        assert size >= 2, "a single rank has nobody to reach"
        assert slot_bytes > 0, "a slot must hold something"
        names = tuple(range(size) if names is None else names)
        assert len(names) == size, f"{len(names)} names for {size} ranks"
        slot_bytes = -(-slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._fds: list[int] = []
        peers = [[-1] * size for _ in range(size)]
        try:
            memory_fd = os.memfd_create("qengine-ranks")
            self._fds.append(memory_fd)
            for a, b in itertools.combinations(range(size), 2):
                ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                peers[a][b], peers[b][a] = (end.detach() for end in ends)
                self._fds += [peers[a][b], peers[b][a]]
            self._seats = [
                Seat(rank, size, slot_bytes, memory_fd, tuple(row), names, tuple(pairs))
                for rank, row in enumerate(peers)
            ]
            # Now, not on the first write, which could only be answered with a signal that ends the rank.
            os.posix_fallocate(memory_fd, 0, self._seats[0].memory_bytes)
        except OSError as error:
            self.close()
            raise TransportError(
                f"{size} ranks need {size * size} descriptors and {_num_slots(size, pairs) * slot_bytes >> 20} MiB of "
                f"host memory to reach each other, and the system refuses: {error.strerror or error}"
            ) from error

    def __iter__(self) -> Iterator[Seat]:
        return iter(self._seats)

    def __enter__(self) -> Seats:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close this process's copies. Idempotent."""
        while self._fds:
            os.close(self._fds.pop())
