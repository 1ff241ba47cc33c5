"""Prefix cache: which of a request's blocks others have computed before it, and which of its own others may find.

Invariant: a block is offered only when its last slot is computed, under a key that covers every token from the start of
the sequence, the pool's namespace, and the request's salt or group. The blocks themselves are the pool's.
"""

from __future__ import annotations

from qengine.scheduling.block_pool import BlockPool
from qengine.scheduling.tracking import Track


class PrefixCache:
    """Keys of requests' blocks over a pool. If not `enabled`, only siblings share, by a key that is theirs alone."""

    def __init__(self, pool: BlockPool, *, enabled: bool) -> None:
        self._pool = pool
        self._enabled = enabled

    def start(self, track: Track, leader: Track | None) -> None:
        """Give a new track the root of its keys; `leader` is the live sibling it follows, if any."""
        if self._enabled:
            track.root = self._pool.root_hash(track.request.cache_salt)
        elif leader is not None:
            if leader.root is None:
                leader.root = self._pool.private_root_hash(leader.arrival)
                self.register_computed(leader)
            track.root = leader.root

    def match(self, track: Track) -> list[int]:
        """Blocks that hold the beginning of a track's tokens, as far as it may use them; takes no references."""
        if track.root is None:
            return []
        return self._pool.match_prefix(self._hashes(track, track.max_cached_tokens // self._pool.block_size))

    def register_computed(self, track: Track) -> None:
        """Offer those of a running track's blocks that are full and computed."""
        num_full = track.request.num_computed_tokens // self._pool.block_size
        if track.root is None or num_full <= track.num_registered:
            return
        hashes = self._hashes(track, num_full)
        for index in range(track.num_registered, num_full):
            self._pool.register(track.table[index], hashes[index])
        track.num_registered = num_full

    def must_wait_for(self, leader: Track, follower: Track) -> bool:
        """Whether the leader has yet to compute prompt blocks that the follower could share."""
        num_common = min(follower.max_cached_tokens, leader.request.num_prompt_tokens)
        num_common -= num_common % self._pool.block_size
        return leader.request.num_computed_tokens < num_common

    def _hashes(self, track: Track, num_blocks: int) -> list[bytes]:
        """Keys of the first `num_blocks` blocks of a request's known tokens, each computed once in its life."""
        assert track.root is not None, "a request without a root has no keys"
        request, size = track.request, self._pool.block_size
        hashes = request.block_hashes
        for index in range(len(hashes), num_blocks):
            parent = hashes[-1] if hashes else track.root
            hashes.append(self._pool.block_hash(parent, request.tokens_between(index * size, (index + 1) * size)))
        return hashes[:num_blocks]
