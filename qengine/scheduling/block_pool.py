"""Block pool: which KV blocks are taken, shared, or free but still worth finding again by their content.

Every block is in exactly one of three places:

    referenced (refcount > 0) --free--> cached (has a hash, least recently freed first) or blank (no hash)
    blank, then cached from its old end --allocate--> referenced;   cached --share--> referenced

Invariant: a hash names at most one block and a block has at most one hash; a block with references is never handed out
again. Every operation costs O(blocks named in the call), never O(pool). The pool holds numbers only: it neither knows
requests nor owns memory.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from qengine.errors import ConfigError

_ROOT_TAG, _PRIVATE_TAG, _BLOCK_TAG = b"root", b"priv", b"blok"


class BlockPool:
    """Reference-counted blocks with a prefix cache keyed by a sha256 chain.

    The key of a full block is sha256(parent key, its token ids as 8-byte integers); the parent of a first block is a
    root key made of `namespace` and the request's salt. So equal keys mean equal tokens from the start of the sequence
    on, under the same namespace and salt, as surely as sha256 has no known collision.

    Args:
        num_blocks: blocks in the pool, at least 1.
        block_size: tokens per block, at least 1.
        namespace: whatever else decides what KV holds (model, revision, KV dtype, rope scaling, adapter).

    Raises:
        ConfigError: if a size is below 1.
    """

    def __init__(self, num_blocks: int, block_size: int, namespace: str = "") -> None:
        for name, value in (("num_blocks", num_blocks), ("block_size", block_size)):
            if value < 1:
                raise ConfigError(f"{name} is {value}, expected at least 1; give the KV cache more memory")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._namespace = namespace.encode()
        self._num_refs = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        # Blank blocks are a stack: block 0 comes out first, and what was used last is used next.
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()

    # ---- keys

    def root_hash(self, salt: str) -> bytes:
        """Key that a salt's first blocks hang from, 32 bytes; different salts never share a block."""
        return self._root(_ROOT_TAG, salt.encode())

    def private_root_hash(self, number: int) -> bytes:
        """Like `root_hash`, from a number that only one group of requests knows; no salt can equal it."""
        return self._root(_PRIVATE_TAG, struct.pack("<q", number))

    def _root(self, tag: bytes, salt: bytes) -> bytes:
        # The length keeps (namespace, salt) apart from every other way to cut the same bytes in two.
        return self._digest(tag + struct.pack("<q", len(self._namespace)) + self._namespace + salt)

    def block_hash(self, parent: bytes, token_ids: Sequence[int]) -> bytes:
        """Key of the full block holding `token_ids` ([block_size]) after the block or root keyed `parent`."""
        assert len(token_ids) == self.block_size, "only full blocks have a key"
        return self._digest(_BLOCK_TAG + parent + struct.pack(f"<{len(token_ids)}q", *token_ids))

    def _digest(self, data: bytes) -> bytes:
        return hashlib.sha256(data).digest()

    # ---- counts

    @property
    def num_free(self) -> int:
        """Blocks without references, cached ones included."""
        return len(self._blank) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks that a prefix match can find, referenced or not."""
        return len(self._block_of)

    @property
    def num_free_cached(self) -> int:
        """Free blocks that a prefix match can find."""
        return len(self._cached)

    @property
    def usage(self) -> float:
        """Share of blocks that are referenced, 0 to 1."""
        return 1.0 - self.num_free / self.num_blocks

    def can_allocate(self, num_blocks: int) -> bool:
        return num_blocks <= self.num_free

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def num_unreferenced(self, block_ids: Iterable[int]) -> int:
        """How many of these blocks are free, that is by how much `share` would lower `num_free`."""
        return sum(1 for block_id in block_ids if not self._num_refs[block_id])

    # ---- taking and giving back

    def allocate(self, num_blocks: int) -> list[int]:
        """Take `num_blocks` blocks with one reference each; blank ones first, then the longest unused cached ones."""
        assert self.can_allocate(num_blocks), f"allocate({num_blocks}) with {self.num_free} free: ask can_allocate"
        return [self._take_one() for _ in range(num_blocks)]

    def _take_one(self) -> int:
        if self._blank:
            block_id = self._blank.pop()
        else:
            block_id, _ = self._cached.popitem(last=False)
            self._drop_hash(block_id)
        self._num_refs[block_id] = 1
        return block_id

    def share(self, block_ids: Iterable[int]) -> None:
        """Add a reference to blocks found by `match_prefix`."""
        for block_id in block_ids:
            if not self._num_refs[block_id]:
                del self._cached[block_id]
            self._num_refs[block_id] += 1

    def free(self, block_ids: Sequence[int]) -> None:
        """Drop one reference from each block of one sequence, given in sequence order.

        A block nobody references keeps its hash until it is handed out again. The tail is put in the queue before the
        head, so it is evicted first: a head without its tail can still be matched, a tail without its head cannot.
        """
        for block_id in reversed(block_ids):
            assert self._num_refs[block_id] > 0, f"block {block_id} is freed twice"
            self._num_refs[block_id] -= 1
            if self._num_refs[block_id]:
                continue
            if self._hashes[block_id] is None:
                self._blank.append(block_id)
            else:
                self._cached[block_id] = None

    # ---- prefix cache

    def match_prefix(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks for the longest run of leading keys that are cached; takes no references."""
        found = []
        for key in hashes:
            block_id = self._block_of.get(key)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def register(self, block_id: int, key: bytes) -> None:
        """Make a referenced, fully computed block findable. If the key is taken the first block keeps it."""
        assert self._num_refs[block_id] > 0, f"block {block_id} is registered while free"
        if key not in self._block_of and self._hashes[block_id] is None:
            self._block_of[key] = block_id
            self._hashes[block_id] = key

    def forget(self, block_ids: Iterable[int]) -> None:
        """Never match these referenced blocks again (their content turned out to be broken)."""
        for block_id in block_ids:
            assert self._num_refs[block_id] > 0, f"block {block_id} is forgotten while free"
            self._drop_hash(block_id)

    def reset_prefix_cache(self) -> None:
        """Forget every key; references stay. Costs O(cached blocks)."""
        for block_id in self._block_of.values():
            self._hashes[block_id] = None
        self._block_of.clear()
        self._blank.extend(self._cached)
        self._cached.clear()

    def _drop_hash(self, block_id: int) -> None:
        key = self._hashes[block_id]
        if key is not None:
            del self._block_of[key]
            self._hashes[block_id] = None

    # ---- proof

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert every invariant, given the block tables of all live sequences. O(pool): for tests and debugging."""
        expected = Counter(block_id for table in tables for block_id in table)
        assert all(0 <= block_id < self.num_blocks for block_id in expected), "a table names a block out of range"
        free = set(self._blank) | set(self._cached)
        assert len(free) == self.num_free, "a block is in the free lists twice"
        for block_id in range(self.num_blocks):
            num_refs = self._num_refs[block_id]
            assert num_refs == expected[block_id], (
                f"block {block_id}: {num_refs} references, {expected[block_id]} users"
            )
            assert (num_refs == 0) == (block_id in free), f"block {block_id} is both free and used, or neither"
        assert all(self._hashes[block_id] is None for block_id in self._blank), "a blank block has a hash"
        assert all(self._hashes[block_id] is not None for block_id in self._cached), "a cached block has no hash"
        keyed = {key: block_id for block_id, key in enumerate(self._hashes) if key is not None}
        assert keyed == self._block_of, "hashes and their index disagree"
