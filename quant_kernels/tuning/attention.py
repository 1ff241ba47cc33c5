"""Which configuration of the attention kernel runs a step on a card.

A decode step reads each key once for all query heads that share it, so its tile has the tensor cores' 16 rows and
memory is the limit; prompt chunks multiply, so theirs is taller. Invariant: every tile named here is compiled and
checked by `quant_kernels.resources`, and how a sequence's keys are shared out depends on that sequence alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quant_kernels.tuning.card import Card

#: Head sizes that models have; others fit the next one's registers, but nobody has compiled them.
HEAD_DIMS = (64, 80, 96, 128, 256)
BLOCK_SIZES = (16, 32)
#: Rows of a tile that can store its columns in another order; taller ones have no registers left for the places.
MAX_ORDERED_ROWS = 16
#: Keys that a share holds at least; shorter ones end before their pipeline is full.
MIN_SHARE = 128
#: Programs per multiprocessor that shares are cut for.
_PROGRAMS_PER_SM = 2
_MAX_SHARES = 64


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """What one program of the attention kernel computes at a time.

    Attributes:
        block_m: query rows: tokens times the query heads of a group.
        keys: keys per turn of the loop.
    """

    block_m: int
    keys: int
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        """Short, e.g. "16x64 w4 s3": query rows x keys, warps, stages."""
        return f"{self.block_m}x{self.keys} w{self.num_warps} s{self.num_stages}"


def attention_tiles(arch: int, head_dim: int, *, packed: bool) -> tuple[AttentionTile, ...]:
    """All tiles of a head size, shortest first.

    Args:
        packed: whether the cache holds bytes, which come two to a word.
    """
    if head_dim > 128:
        return (AttentionTile(16, 32, 4, 3), AttentionTile(32, 32, 4, 2))
    # Two warps do the least besides multiplying, but heads of 80 and 96 need masks, for which they have no registers.
    has_masks = head_dim & (head_dim - 1) != 0 and not packed
    short = AttentionTile(16, 64, 4 if has_masks else 2, 3)
    if arch == 90:
        return (short, AttentionTile(64, 64, 4, 3), AttentionTile(128, 64, 8, 3))
    # Bytes are half as many registers on their way as floats.
    return (short, AttentionTile(64, 64, 4 if packed else 8, 2))


def max_group(arch: int, head_dim: int) -> int:
    """Query heads that may share a key: one token of all of them must fit a tile."""
    return max(tile.block_m for tile in attention_tiles(arch, head_dim, packed=False))


def select_attention(card: Card, head_dim: int, group: int, num_tokens: int, *, packed: bool) -> AttentionTile:
    """The shortest tile that holds a sequence's rows of a step, or the tallest.

    Args:
        group: query heads per KV head.
        num_tokens: most query tokens that a sequence has in the step.
    """
    tiles = [t for t in attention_tiles(card.arch, head_dim, packed=packed) if t.block_m >= group]
    assert tiles, f"{group} query heads per KV head are more than any tile has rows"
    return next((t for t in tiles if t.block_m >= num_tokens * group), tiles[-1])


def most_shares(card: Card, num_kv_heads: int) -> int:
    """Into how many shares the keys of one sequence are cut at most: as many as fill the card with it alone."""
    wanted = card.num_sms * _PROGRAMS_PER_SM // num_kv_heads
    return max(1, min(_MAX_SHARES, wanted))
