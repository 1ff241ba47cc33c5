"""Running set: the requests that hold blocks, in order of admission, and the promise made to the protected ones.

Invariant: `num_reserved` free blocks are promised to protected requests (preempted as often as allowed), enough for
each to reach its end; only they may take from them. So a protected request never lacks a block. The set gives and
takes blocks; who is admitted or preempted is the scheduler's choice.
"""

from __future__ import annotations

from collections.abc import Iterator

from qengine.scheduling.block_pool import BlockPool
from qengine.scheduling.flights import Flights
from qengine.scheduling.tracking import Track


class RunningSet:
    """Insertion-ordered: O(1) removal, and the last admitted is at hand."""

    def __init__(self, pool: BlockPool, flights: Flights) -> None:
        self._pool = pool
        self._flights = flights
        self._tracks: dict[str, Track] = {}
        self._num_reserved = 0

    def __len__(self) -> int:
        return len(self._tracks)

    def __iter__(self) -> Iterator[Track]:
        return iter(self._tracks.values())

    @property
    def num_reserved(self) -> int:
        """Free blocks promised to protected requests."""
        return self._num_reserved

    @property
    def num_available(self) -> int:
        """Free blocks promised to nobody."""
        return self._pool.num_free - self._num_reserved

    def victim(self) -> Track | None:
        """The request to preempt, if any may be: of those preempted least often the last admitted."""
        candidates = (track for track in reversed(self._tracks.values()) if not track.protected)
        return min(candidates, key=lambda track: track.request.num_preemptions, default=None)

    def admit(self, track: Track, cached: list[int]) -> None:
        """Give a request blocks for all its known tokens, the first ones from the prefix cache."""
        request = track.request
        self._pool.share(cached)
        num_new = self._pool.num_blocks_for(request.num_tokens) - len(cached)
        track.extend_table(cached + self._pool.allocate(num_new))
        track.num_registered = track.num_shared = len(cached)
        request.num_computed_tokens = track.num_planned = len(cached) * self._pool.block_size
        track.running = True
        self._tracks[request.request_id] = track
        self._num_reserved += track.num_reserved

    def try_grow(self, track: Track) -> bool:
        """Give a running request the blocks that its known tokens still lack; False if too few are free for it."""
        num_more = self._pool.num_blocks_for(track.request.num_tokens) - len(track.table)
        if num_more <= 0:
            return True
        if track.protected:
            self._num_reserved -= num_more
        elif num_more > self.num_available:
            return False
        track.extend_table(self._pool.allocate(num_more))
        return True

    def release(self, track: Track) -> None:
        """Take a request and its blocks out; its tokens must be computed again if it comes back.

        Blocks that a step in flight has become free when it lands.
        """
        del self._tracks[track.request.request_id]
        self._num_reserved -= track.num_reserved
        self._flights.free(track)
        track.clear_table()
        track.running = False

    def check_integrity(self) -> None:
        """Assert the promise and every table. O(pool + tokens held)."""
        self._pool.check_integrity([*(track.table for track in self), *self._flights.held_tables])
        assert self._num_reserved == sum(track.num_reserved for track in self), "the reservation is off"
        assert 0 <= self._num_reserved <= self._pool.num_free, "more is promised than is free"
        for track in self:
            request = track.request
            assert track.running, "a request in the running set does not run"
            assert list(track.table) == request.block_ids, "the two copies of a table differ"
            num_slots = len(track.table) * self._pool.block_size
            assert request.num_computed_tokens <= track.num_planned <= num_slots, "a computed token has no slot"
            assert track.num_flights or request.num_computed_tokens == track.num_planned, "a plan without a step"
            assert len(track.table) <= track.worst_blocks, "a request holds more than its worst case"
            num_full = request.num_computed_tokens // self._pool.block_size
            assert track.num_registered <= num_full, "a block is registered before it is computed"
