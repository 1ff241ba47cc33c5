"""Flights: steps that were handed out and whose results are not in yet, in order, and the blocks they still touch.

A pipeline of devices works on several steps at once. Invariant: a block that a step in flight reads or writes is not
handed out again before that step has landed; what its request gives back meanwhile is held here until then. Steps land
in the order in which they were begun. It decides neither what a step computes nor what its results mean.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from qengine.scheduling.batch import Batch
from qengine.scheduling.block_pool import BlockPool
from qengine.scheduling.tracking import Track


@dataclass(slots=True)
class _Flight:
    """One step, the track of each of its entries, and the tables to free when it lands."""

    batch: Batch
    tracks: Sequence[Track]
    held: list[Sequence[int]] = field(default_factory=list)


class Flights:
    """At most `limit` steps in flight, oldest first."""

    def __init__(self, pool: BlockPool, limit: int) -> None:
        self._pool = pool
        self._limit = limit
        self._flights: deque[_Flight] = deque()

    def __len__(self) -> int:
        return len(self._flights)

    @property
    def has_room(self) -> bool:
        return len(self._flights) < self._limit

    @property
    def held_tables(self) -> Iterator[Sequence[int]]:
        """Tables of requests that gave their blocks up while a step had them."""
        for flight in self._flights:
            yield from flight.held

    def begin(self, batch: Batch, tracks: Sequence[Track]) -> None:
        """Hand a step out."""
        assert self.has_room, "schedule() before update() or discard() of a step before"
        for track in tracks:
            track.num_flights += 1
        self._flights.append(_Flight(batch, tracks))

    def land(self, batch: Batch) -> Sequence[Track]:
        """Take the oldest step in; returns the track of each entry."""
        assert self._flights, "update() without schedule()"
        assert self._flights[0].batch is batch, "update() with another batch than the oldest in flight"
        return self._end(self._flights.popleft())

    def cancel(self, batch: Batch) -> Sequence[Track]:
        """Forget the newest step, which did not run; returns the track of each entry."""
        assert self._flights, "discard() without schedule()"
        assert self._flights[-1].batch is batch, "discard() of another batch than the newest in flight"
        return self._end(self._flights.pop())

    def free(self, track: Track) -> None:
        """Give a track's blocks back to the pool, once the last step that has them has landed."""
        if not track.num_flights:
            self._pool.free(track.table)
            return
        last = next(flight for flight in reversed(self._flights) if track in flight.tracks)
        last.held.append(track.table)

    def _end(self, flight: _Flight) -> Sequence[Track]:
        for track in flight.tracks:
            track.num_flights -= 1
        for table in flight.held:
            self._pool.free(table)
        return flight.tracks

    def check_integrity(self) -> None:
        """Assert that each entry's blocks are still kept for it, and that tracks know in how many steps they are."""
        held = {tuple(table) for table in self.held_tables}
        counts: Counter[Track] = Counter()
        for flight in self._flights:
            counts.update(flight.tracks)
            for entry, track in zip(flight.batch.entries, flight.tracks, strict=True):
                kept = {track.table} if track.running else held
                assert any(table[: len(entry.block_ids)] == entry.block_ids for table in kept), (
                    f"blocks of {entry.request_id!r} were given away while a step has them"
                )
        assert all(track.num_flights == count for track, count in counts.items()), "a track's steps are miscounted"
