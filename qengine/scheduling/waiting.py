"""Waiting queue: live requests that hold no blocks, in the order in which they will be admitted.

Order: preempted requests first, then new ones, each by arrival. A follower whose leader has yet to compute their common
prompt is set aside and comes back to its place when the leader is ready, so it holds up nobody.
Invariant: a track is in the queue or set aside under one leader, never both. It decides nothing about fitting.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from qengine.scheduling.tracking import Track


def _order(track: Track) -> tuple[bool, int]:
    return track.request.num_preemptions == 0, track.arrival


class WaitingQueue:
    """A list kept sorted: insertion and removal move pointers only, microseconds for thousands of requests."""

    def __init__(self) -> None:
        self._queue: list[Track] = []
        self._deferred: dict[str, list[Track]] = {}
        self._num_deferred = 0

    def __len__(self) -> int:
        return len(self._queue) + self._num_deferred

    def __iter__(self) -> Iterator[Track]:
        yield from self._queue
        for followers in self._deferred.values():
            yield from followers

    @property
    def num_deferred(self) -> int:
        return self._num_deferred

    @property
    def head(self) -> Track | None:
        """The request to admit next."""
        return self._queue[0] if self._queue else None

    def push(self, track: Track) -> None:
        insort(self._queue, track, key=_order)

    def pop_head(self) -> Track:
        return self._queue.pop(0)

    def defer_head(self, leader_id: str) -> None:
        """Set the head aside until `release(leader_id)`."""
        self._deferred.setdefault(leader_id, []).append(self.pop_head())
        self._num_deferred += 1

    def release(self, leader_id: str) -> None:
        """Put a leader's followers back into the queue."""
        for track in self._deferred.pop(leader_id, ()):
            self._num_deferred -= 1
            self.push(track)

    def remove(self, track: Track) -> None:
        """Take a waiting track out, wherever it is."""
        leader = track.request.follows
        followers = self._deferred.get(leader.request_id, []) if leader is not None else []
        if leader is not None and track in followers:
            followers.remove(track)
            self._num_deferred -= 1
            if not followers:
                del self._deferred[leader.request_id]
            return
        index = bisect_left(self._queue, _order(track), key=_order)
        assert self._queue[index] is track, f"request {track.request.request_id!r} is not where its order puts it"
        del self._queue[index]

    def check_integrity(self, live: dict[str, Track]) -> None:
        """Assert order and that every follower set aside has a live leader to release it."""
        orders = [_order(track) for track in self._queue]
        assert orders == sorted(set(orders)), "the waiting queue is out of order"
        deferred = [track for followers in self._deferred.values() for track in followers]
        assert len(deferred) == self._num_deferred, "the count of deferred requests is off"
        assert all(self._deferred.values()), "an empty list of followers is kept"
        for track in deferred:
            leader = track.request.follows
            assert leader is not None, "a request that follows nobody is deferred"
            leader_track = live.get(leader.request_id)
            assert leader_track is not None, "a deferred request's leader is gone"
            assert leader_track.request is leader, "a deferred request's leader was replaced"
