"""Block pool: references, eviction order, and keys that no two token lists share."""

from __future__ import annotations

import struct

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from qengine.errors import ConfigError
from qengine.scheduling.block_pool import BlockPool


def fill(pool: BlockPool, num_blocks: int, salt: str = "") -> tuple[list[int], list[bytes]]:
    """A sequence of full, registered blocks, and its keys."""
    table = pool.allocate(num_blocks)
    keys: list[bytes] = []
    for index, block_id in enumerate(table):
        parent = keys[-1] if keys else pool.root_hash(salt)
        keys.append(pool.block_hash(parent, [index] * pool.block_size))
        pool.register(block_id, keys[-1])
    return table, keys


def test_a_block_is_free_only_when_its_last_user_is_gone() -> None:
    pool = BlockPool(8, 2)
    table, keys = fill(pool, 3)
    assert pool.match_prefix(keys) == table
    pool.share(table[:2])
    pool.free(table)
    assert pool.num_free == 6
    pool.check_integrity([table[:2]])
    pool.free(table[:2])
    assert pool.num_free == 8
    assert pool.usage == 0.0
    pool.check_integrity([])


def test_freed_blocks_can_be_matched_until_they_are_handed_out() -> None:
    pool = BlockPool(4, 2)
    table, keys = fill(pool, 3)
    pool.free(table)
    assert pool.num_unreferenced(table) == 3
    pool.share(pool.match_prefix(keys))
    assert pool.num_free == 1
    pool.free(table)
    pool.allocate(4)
    assert pool.match_prefix(keys) == []


def test_blank_blocks_go_first_then_tails_before_heads_then_the_longest_unused() -> None:
    pool = BlockPool(7, 2)
    old, old_keys = fill(pool, 3, "old")
    new, new_keys = fill(pool, 3, "new")
    pool.free(old)
    pool.free(new)
    matched = []
    for _ in range(7):
        pool.allocate(1)
        matched.append((len(pool.match_prefix(old_keys)), len(pool.match_prefix(new_keys))))
    assert matched == [(3, 3), (2, 3), (1, 3), (0, 3), (0, 2), (0, 1), (0, 0)]


def test_a_taken_key_stays_with_the_first_block() -> None:
    pool = BlockPool(4, 2)
    first, keys = fill(pool, 1)
    second, _ = fill(pool, 1)
    assert pool.match_prefix(keys) == first
    pool.free(first)
    pool.free(second)
    pool.check_integrity([])
    assert pool.match_prefix(keys) == first


def test_forget_and_reset_end_matching_but_not_use() -> None:
    pool = BlockPool(8, 2)
    table, keys = fill(pool, 3)
    pool.forget(table[1:2])
    assert pool.match_prefix(keys) == table[:1]
    other, other_keys = fill(pool, 2, "other")
    pool.free(other)
    pool.reset_prefix_cache()
    assert pool.match_prefix(keys) == pool.match_prefix(other_keys) == []
    assert pool.num_cached == 0
    pool.check_integrity([table])


def test_misuse_is_caught() -> None:
    pool = BlockPool(2, 2)
    with pytest.raises(AssertionError, match="ask can_allocate"):
        pool.allocate(3)
    table = pool.allocate(1)
    pool.free(table)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(table)
    with pytest.raises(AssertionError, match="1 users"):
        pool.check_integrity([table])
    with pytest.raises(AssertionError, match="only full blocks"):
        pool.block_hash(b"", [1])


@pytest.mark.parametrize("sizes", [(0, 16), (4, 0), (-1, 16)])
def test_impossible_sizes_are_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="expected at least 1"):
        BlockPool(*sizes)


class _PythonHashPool(BlockPool):
    """What the pool must not be: its keys are 64-bit Python hashes of the token ids."""

    def _digest(self, data: bytes) -> bytes:
        tokens = struct.unpack(f"<{len(data[-8 * self.block_size :]) // 8}q", data[-8 * self.block_size :])
        return struct.pack("<q", hash(tokens))


# Python hashes an integer modulo 2**61 - 1, and -1 like -2: these lists collide in 64 bits.
_COLLIDING = [([0, 7], [2**61 - 1, 7]), ([5, 1], [5, 2**61]), ([-1, -1], [-2, -2])]


@pytest.mark.parametrize(("mine", "yours"), _COLLIDING)
def test_token_lists_that_collide_in_64_bits_do_not_hit(mine: list[int], yours: list[int]) -> None:
    def crosses(pool: BlockPool) -> bool:
        table = pool.allocate(1)
        root = b"\0" * 32
        pool.register(table[0], pool.block_hash(root, mine))
        return bool(pool.match_prefix([pool.block_hash(root, yours)]))

    assert hash(tuple(mine)) == hash(tuple(yours))
    assert crosses(_PythonHashPool(2, 2)), "the collision is real"
    assert not crosses(BlockPool(2, 2))


def test_keys_depend_on_every_token_its_place_the_salt_and_the_namespace() -> None:
    pool = BlockPool(4, 2)
    chains = {
        (pool.block_hash(pool.block_hash(pool.root_hash(salt), first), second))
        for salt in ("", "a", "b")
        for first in ([1, 2], [2, 1], [258, 0], [1, 0])
        for second in ([1, 2], [2, 1], [258, 0], [1, 0])
    }
    assert len(chains) == 3 * 4 * 4
    roots = {BlockPool(4, 2, namespace).root_hash(salt) for namespace, salt in (("ab", "c"), ("a", "bc"), ("abc", ""))}
    roots |= {BlockPool(4, 2, "ab").private_root_hash(number) for number in (0, 1)}
    # A salt that spells out a private number's bytes is still another root.
    roots.add(BlockPool(4, 2, "ab").root_hash("\0" * 8))
    assert len(roots) == 6
    assert BlockPool(4, 2, "ab").root_hash("c") == BlockPool(9, 4, "ab").root_hash("c")


class PoolWalk(RuleBasedStateMachine):
    """Random use of the pool; every invariant is checked after every step."""

    @initialize(num_blocks=st.integers(1, 10), block_size=st.integers(1, 3))
    def start(self, num_blocks: int, block_size: int) -> None:
        self.pool = BlockPool(num_blocks, block_size)
        self.tables: list[list[int]] = []
        self.key_of: dict[int, bytes] = {}

    @rule(contents=st.lists(st.integers(0, 2), max_size=4), num_more=st.integers(0, 2))
    def admit(self, contents: list[int], num_more: int) -> None:
        keys: list[bytes] = []
        for content in contents:
            parent = keys[-1] if keys else self.pool.root_hash("")
            keys.append(self.pool.block_hash(parent, [content] * self.pool.block_size))
        found = self.pool.match_prefix(keys)
        # Matching never finds a block of other content, whatever was evicted meanwhile.
        assert [self.key_of[block_id] for block_id in found] == keys[: len(found)]
        num_new = len(keys) - len(found) + num_more
        if not self.pool.can_allocate(num_new + self.pool.num_unreferenced(found)):
            return
        referenced = {block_id for table in self.tables for block_id in table}
        self.pool.share(found)
        new = self.pool.allocate(num_new)
        assert not set(new) & (referenced | set(found)), "a referenced block was handed out"
        table = found + new
        for block_id in new:
            self.key_of.pop(block_id, None)
        for block_id, key in list(zip(table, keys, strict=False))[len(found) :]:
            self.pool.register(block_id, key)
            self.key_of[block_id] = key
        self.tables.append(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.pool.free(self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1))))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        self.pool.forget(self.tables[data.draw(st.integers(0, len(self.tables) - 1))])

    @rule()
    def reset(self) -> None:
        self.pool.reset_prefix_cache()

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check_integrity(self.tables)

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for table in self.tables:
                self.pool.free(table)
            assert self.pool.num_free == self.pool.num_blocks


TestPoolWalk = PoolWalk.TestCase
TestPoolWalk.settings = settings(max_examples=80, stateful_step_count=40, derandomize=True, deadline=None)
