"""Which kernel and configuration run x [M, K] times a P16 weight on a card, and why.

A reviewed table per GPU name answers for the shapes it was measured on, a rule for all others; nothing is timed here.
The rule follows regimes of M, because that is what decides how tall a tile must be: up to 16, 32 and 64 rows, and
beyond, until expanding the weight for a dense matmul is cheaper.

Invariant: what is chosen depends on M only through its regime, so that a kernel of ours gives a row the same bits
whatever else shares its step within one (cuBLAS, which runs expanded weights, promises no such thing). Every tile named
here or in a table is compiled and checked by `quant_kernels.resources`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from quant_kernels.scheme import COLUMN_MULTIPLE, Scheme, ZeroKind
from quant_kernels.tuning.card import KB, REGISTERS_PER_SM, Card, card_of
from quant_kernels.tuning.table import TunedChoice, TuningTable, load_table
from quant_kernels.tuning.tile import Tile

MATMUL, GATE_UP, EXPAND = "matmul", "gate_up", "expand"
#: Upper ends of the regimes of M; beyond the last one every power of two is its own.
REGIMES = (16, 32, 64)
#: Regimes of M above this one expand the weight for a dense matmul (docs/kernels.md, "Regimes").
EXPAND_ABOVE: Mapping[int, int] = {80: 512, 86: 1024, 89: 2048, 90: 256, 120: 2048}
SPLITS = (1, 2, 4, 8, 16)
#: A split keeps at least this many blocks of K, or its programs end before their pipeline is full.
MIN_BLOCKS_PER_SPLIT = 4
#: Of two splits whose waves fill the card about equally, the smaller one writes fewer partial sums.
SPLIT_TOLERANCE = 0.03
#: From this many outputs on, tiles of 256 columns still make enough programs.
WIDE_COLUMNS = 16384
#: Registers a thread takes, by the tile's height; measured by `quant_kernels.resources`.
_REGISTERS: Mapping[int, int] = {16: 128, 32: 168, 64: 200}
_GATE_UP_ROWS = 32
_GATE_UP_COLUMNS = 64


@dataclass(frozen=True, slots=True)
class Problem:
    """x [rows, in_features] times a weight of `scheme` with `out_features` outputs."""

    rows: int
    in_features: int
    out_features: int
    scheme: Scheme


@dataclass(frozen=True, slots=True)
class Choice:
    """What runs a problem.

    Attributes:
        kernel: MATMUL, GATE_UP or EXPAND.
        tile: None for EXPAND.
        split_k: shares of K; more than one leaves partial sums.
        reason: for people.
    """

    kernel: str
    tile: Tile | None
    split_k: int
    reason: str


def regime(rows: int) -> int:
    """The largest M that is treated like this one."""
    for upper in REGIMES:
        if rows <= upper:
            return upper
    return 1 << (rows - 1).bit_length()


def select(problem: Problem, card: Card, table: TuningTable, *, half_sums: bool = False) -> Choice:
    """The kernel for a linear.

    Args:
        half_sums: let GeForce cards add up in float16 where M is large; see `Tile`.
    """
    tuned = table.find(MATMUL, problem.scheme, problem.in_features, problem.out_features, regime(problem.rows))
    choice = _from_table(tuned, table) if tuned is not None else _by_rule(problem, card)
    if half_sums and choice.tile is not None and can_sum_in_half(choice.tile, problem, card):
        return replace(choice, tile=replace(choice.tile, half_sums=True), reason=choice.reason + ", float16 sums")
    return choice


def can_sum_in_half(tile: Tile, problem: Problem, card: Card) -> bool:
    """Whether float16 sums may be asked for: common float16 weights and many rows, on cards that gain by it."""
    scheme = problem.scheme
    is_tall = regime(problem.rows) > REGIMES[2] and tile.scale_weight and scheme.blocks_per_group > 0
    return is_tall and card.is_geforce and _is_common(scheme) and scheme.dtype == torch.float16


def select_gate_up(problem: Problem, card: Card, table: TuningTable) -> Choice | None:
    """The fused kernel for a weight [gate | up], or None where two launches are faster or the shape does not fit it."""
    possible, tile = can_fuse_gate_up(problem), gate_up_tile(regime(problem.rows), problem.scheme)
    if not possible or tile is None:
        return None
    tuned = table.find(GATE_UP, problem.scheme, problem.in_features, problem.out_features, regime(problem.rows))
    if tuned is not None:
        return _from_table(tuned, table) if tuned.tile is not None else None
    programs = problem.out_features // 2 // tile.block_n
    if programs < card.num_sms:
        return None
    return Choice(GATE_UP, tile, 1, f"rule: {programs} programs fill {card.num_sms} multiprocessors without a split")


def can_fuse_gate_up(problem: Problem) -> bool:
    """Whether the fused kernel exists for the shape: few rows, a common scheme, halves of whole tiles."""
    fits = problem.out_features % (2 * _GATE_UP_COLUMNS) == 0
    return fits and _is_common(problem.scheme) and problem.rows <= _GATE_UP_ROWS


def gate_up_tile(rows: int, scheme: Scheme) -> Tile | None:
    """The fused kernel's tile for a regime, or None where it has none."""
    if rows > _GATE_UP_ROWS or not _is_common(scheme):
        return None
    if rows <= REGIMES[0]:
        return Tile(16, _GATE_UP_COLUMNS)
    return Tile(32, _GATE_UP_COLUMNS, num_stages=3, scale_weight=scheme.groups > 1)


def matmul_tiles(arch: int, rows: int, scheme: Scheme) -> dict[str, Tile]:
    """The rule's tiles for a regime, by name: "base", and "narrow" or "wide" where they exist."""
    if rows <= REGIMES[0]:
        tiles = {"base": Tile(16, 128)}
        if scheme.codebook is None:
            tiles["narrow"] = Tile(16, 64, num_warps=2)
        if _is_common(scheme):
            tiles["wide"] = Tile(16, 256, num_warps=8)
        return tiles
    medium = Tile(32, 128, num_stages=3, scale_weight=scheme.groups > 1)
    if rows <= REGIMES[1]:
        return {"base": medium}
    if arch == 90:
        # wgmma reads weights from shared memory. Scaling them on the way there, or four sums in turn, costs registers
        # that it does not have: such weights stay with the shorter tile, which multiplies from registers.
        tall = scheme.groups <= 2 and scheme.zero != ZeroKind.MIN
        return {"base": Tile(64, 128, num_stages=3) if tall else medium}
    # Words of 8 bits carry half the inputs, so half a block would leave the tensor cores too little per step.
    word_rows, stages = (16, 4) if scheme.bits == 4 else (32, 3)
    tiles = {"base": Tile(64, 128, word_rows, num_stages=stages, scale_weight=True)}
    if rows > REGIMES[2] and _is_common(scheme):
        tiles["wide"] = Tile(64, 256, word_rows, 8, stages, scale_weight=True)
    return tiles


def _is_common(scheme: Scheme) -> bool:
    """4-bit codes with integer zero points: what most checkpoints hold, and what gets more tiles to choose from."""
    return scheme.bits == 4 and scheme.zero in (ZeroKind.CONST, ZeroKind.INTEGER)


def choose_split(tile: Tile, problem: Problem, card: Card) -> int:
    """How many shares of K fill the card's multiprocessors best, for all M of the problem's regime alike."""
    rows = regime(problem.rows)
    programs = -(-problem.out_features // tile.block_n) * -(-rows // tile.block_m)
    num_blocks = -(-problem.in_features // problem.scheme.block_inputs)
    slots = card.num_sms * programs_per_sm(tile, problem.scheme, card)
    fits = [s for s in SPLITS if s == 1 or num_blocks // s >= MIN_BLOCKS_PER_SPLIT]
    if rows > REGIMES[2]:
        return 1
    filled = {s: programs * s / (-(-programs * s // slots) * slots) for s in fits}
    best = max(filled.values())
    return next(s for s in fits if filled[s] >= best * (1 - SPLIT_TOLERANCE))


def programs_per_sm(tile: Tile, scheme: Scheme, card: Card) -> int:
    """Programs that share a multiprocessor, by shared memory and registers; at least one."""
    by_shared = card.shared_per_sm // (tile.shared_bytes(scheme.bits, card.arch) + KB)
    registers = min(tile.max_registers, _REGISTERS[tile.block_m])
    by_registers = REGISTERS_PER_SM // (registers * 32 * tile.num_warps)
    return max(1, min(by_shared, by_registers))


def _from_table(tuned: TunedChoice, table: TuningTable) -> Choice:
    kernel = EXPAND if tuned.tile is None else tuned.kernel
    return Choice(kernel, tuned.tile, tuned.split_k, f"measured on {table.card}")


def _by_rule(problem: Problem, card: Card) -> Choice:
    rows = regime(problem.rows)
    most = EXPAND_ABOVE.get(card.arch, max(EXPAND_ABOVE.values()))
    if rows > most:
        return Choice(EXPAND, None, 1, f"rule: above {most} rows on sm_{card.arch}")
    tiles = matmul_tiles(card.arch, rows, problem.scheme)
    padded = problem.out_features + -problem.out_features % COLUMN_MULTIPLE
    name, tile = "base", tiles["base"]
    if "wide" in tiles and problem.out_features >= WIDE_COLUMNS and padded % tiles["wide"].block_n == 0:
        name, tile = "wide", tiles["wide"]
    split = choose_split(tile, problem, card)
    if "narrow" in tiles and -(-problem.out_features // tile.block_n) * split < card.num_sms:
        name, tile = "narrow", tiles["narrow"]
        split = choose_split(tile, problem, card)
    return Choice(MATMUL, tile, split, f"rule: {name} tile for up to {rows} rows on sm_{card.arch}")


@dataclass(frozen=True, slots=True)
class Selector:
    """`select` and `select_gate_up` for one card: what a device's linears share.

    Attributes:
        card, table: the GPU and what was measured on it.
        half_sums: let GeForce cards add up in float16 where M is large.
        twin: run plain Triton instead of assembly, on a compiler whose assembly failed its test.
    """

    card: Card
    table: TuningTable
    half_sums: bool = False
    twin: bool = False

    @classmethod
    def of(cls, device: torch.device) -> Selector:
        """For a CUDA device.

        Raises:
            ValueError: if its tuning table is damaged.
        """
        card = card_of(device)
        return cls(card, load_table(card))

    def matmul(self, problem: Problem) -> Choice:
        """What runs a linear."""
        return select(problem, self.card, self.table, half_sums=self.half_sums)

    def gate_up(self, problem: Problem) -> Choice | None:
        """What runs gate and up in one kernel, or None for two launches."""
        return select_gate_up(problem, self.card, self.table)
