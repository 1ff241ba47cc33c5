"""What a weight takes in memory once it is prepared, from what headers tell of it: arithmetic alone, without torch.

A `WeightFacts` stands for a weight nobody has read. `fuse` joins neighbours as `packing.concat_outputs` would, and
`prepared_bytes` is the `num_bytes` of what `linear.dispatch.prepare` would make. Invariant: both agree with the real
ones byte for byte (tests prepare every format and compare). What only the data can tell is told by whoever makes the
facts: whether zero points are all the same, and whether an activation order is one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

#: Bytes of a number by the name that configs and torch use.
DTYPE_BYTES: Mapping[str, int] = {"float16": 2, "bfloat16": 2, "float32": 4}
#: Which kernels lay weights out: torch's on a CPU or our own there, Triton's on a GPU.
Kernels = Literal["cpu", "native", "gpu"]

#: P16's block, its padding of outputs, and the planes of a block (see `linear.p16.layout`).
P16_ROWS, P16_COLUMNS = 32, 128
#: Group sizes of torch's int4 kernel, largest first, and its padding of outputs (see `linear.cpu_int4`).
CPU_GROUPS, CPU_COLUMNS = (256, 128, 64, 32), 16
#: An activation order on a CPU is int64; on a GPU int32, there and back.
_ORDER_BYTES, _PADDED_ORDER_BYTES = 8, 12
_NATIVE_ORDER_BYTES = 4
#: Rows that every kernel can give scales of their own.
CHUNK = 32


@dataclass(frozen=True, slots=True)
class WeightFacts:
    """A linear of K = in_features and N = out_features, as headers describe it.

    Attributes:
        bits: 4 or 8 of a `PackedWeight`; None if the weight is not quantized.
        group_size: inputs that share a scale, K for one group.
        zero_const: the zero point of all groups; None where a table holds them, or mins do.
        has_mins: float mins in place of zero points.
        scale_dtype: of scales and mins.
        has_order: there is an activation order.
        is_padded: rows of padding are among `in_features`, which is then the most that there may be.
        bias_dtype: None without a bias.
    """

    in_features: int
    out_features: int
    bits: int | None = None
    group_size: int = 0
    zero_const: int | None = None
    has_mins: bool = False
    scale_dtype: str = "float16"
    has_order: bool = False
    is_padded: bool = False
    bias_dtype: str | None = None

    @property
    def is_one_group(self) -> bool:
        """Whether one scale serves all of K."""
        return self.group_size >= self.in_features

    @property
    def num_tables(self) -> int:
        """Scales, and zero points or mins where they are not all the same."""
        return 1 if self.zero_const is not None else 2


def fuse(parts: Sequence[WeightFacts]) -> list[WeightFacts]:
    """The parts as one weight where they can run as one, else as they are."""
    first = parts[0]
    if any(_kind(part) != _kind(first) for part in parts):
        return list(parts)
    consts = {part.zero_const for part in parts}
    biases = [part.bias_dtype for part in parts if part.bias_dtype is not None]
    merged = replace(
        first,
        out_features=sum(part.out_features for part in parts),
        zero_const=first.zero_const if len(consts) == 1 else None,
        bias_dtype=max(biases, key=lambda name: DTYPE_BYTES[name]) if biases else None,
    )
    return [merged]


def _kind(part: WeightFacts) -> tuple[object, ...]:
    """What must agree for two parts to be one weight."""
    if part.bits is None:
        return (None, part.in_features)
    return (part.bits, part.in_features, part.group_size, part.has_mins, part.scale_dtype, part.has_order)


def group_after_cut(bits: int, group_size: int, in_features: int, inputs: range) -> int | None:
    """The group size of a weight of which only some neighbouring inputs are left, in their natural order.

    A cut within a group leaves smaller ones that start at it. None where they would be so small, or words so broken,
    that no kernel could run them as they lie: such rows are padded (see `sharding`).
    """
    codes_per_word = 32 // bits
    if inputs.start % codes_per_word or len(inputs) % codes_per_word:
        return None
    is_one_group = group_size >= in_features
    part = len(inputs) if is_one_group else math.gcd(group_size, inputs.start)
    had_kernel = is_one_group or group_size % CHUNK == 0
    has_kernel = len(inputs) % CHUNK == 0 and (is_one_group or part % CHUNK == 0)
    return part if has_kernel or not had_kernel else None


def cut_inputs(facts: WeightFacts, inputs: range, *, with_bias: bool) -> WeightFacts:
    """What `sharding.slice_inputs` leaves of a weight; at most, where an activation order spreads the inputs."""
    facts = facts if with_bias else replace(facts, bias_dtype=None)
    if len(inputs) == facts.in_features:
        return facts
    if facts.bits is None:
        return replace(facts, in_features=len(inputs))
    if not facts.has_order:
        group = group_after_cut(facts.bits, facts.group_size, facts.in_features, inputs)
        if group is not None:
            return replace(facts, in_features=len(inputs), group_size=group)
    num_rows = _padded_rows(facts, inputs)
    group = num_rows if facts.is_one_group else CHUNK
    return replace(facts, in_features=num_rows, group_size=group, has_order=True, is_padded=True)


def _padded_rows(facts: WeightFacts, inputs: range) -> int:
    """Rows once every group is filled up to whole chunks; with an activation order the most there may be."""
    if not facts.has_order:
        firsts = range(inputs.start - inputs.start % facts.group_size, inputs.stop, facts.group_size)
        ends = ((max(first, inputs.start), min(first + facts.group_size, inputs.stop)) for first in firsts)
        return sum(-(-(stop - start) // CHUNK) * CHUNK for start, stop in ends)
    num_groups = -(-facts.in_features // facts.group_size)
    spread = (len(inputs) + (CHUNK - 1) * min(num_groups, len(inputs))) // CHUNK * CHUNK
    full = num_groups * -(-facts.group_size // CHUNK) * CHUNK
    return min(spread, full)


def prepared_bytes(facts: WeightFacts, kernels: Kernels, dtype: str) -> int:
    """Bytes that the prepared linear holds.

    Args:
        kernels: of which device.
        dtype: of activations.
    """
    return sum(prepared_parts(facts, kernels, dtype))


def prepared_parts(facts: WeightFacts, kernels: Kernels, dtype: str) -> tuple[int, ...]:
    """The same, tensor by tensor."""
    order = (_order_bytes(facts, kernels),) if facts.has_order else ()
    if facts.bits is not None and kernels == "gpu" and runs_p16(facts, dtype):
        parts = p16_parts(facts.bits, facts.in_features, facts.out_features, _p16_groups(facts))
        return (*parts, *order, *_bias(facts, facts.bias_dtype))
    if facts.bits is not None and kernels == "native" and runs_native(facts, dtype):
        order = (facts.in_features * _NATIVE_ORDER_BYTES,) if facts.has_order else ()
        return (_native_held(facts), *order, *_bias(facts, "float32"))
    if facts.bits is not None and kernels in ("cpu", "native") and runs_cpu_int4(facts, dtype):
        held = cpu_int4_bytes(facts.bits, facts.in_features, facts.out_features, facts.group_size)
        return (held, *order, *_bias(facts, dtype))
    return (dense_bytes(facts.in_features, facts.out_features, dtype), *_bias(facts, dtype))


def _order_bytes(facts: WeightFacts, kernels: Kernels) -> int:
    # With padding a GPU holds the rows' inputs, and the inputs' rows as torch wants them; the rows are the more.
    return facts.in_features * (_PADDED_ORDER_BYTES if facts.is_padded and kernels == "gpu" else _ORDER_BYTES)


def _bias(facts: WeightFacts, dtype: str | None) -> tuple[int, ...]:
    return () if facts.bias_dtype is None or dtype is None else (facts.out_features * DTYPE_BYTES[dtype],)


def dense_bytes(in_features: int, out_features: int, dtype: str) -> int:
    """A matrix in the compute dtype."""
    return in_features * out_features * DTYPE_BYTES[dtype]


# torch's int4 kernel


def cpu_group(group_size: int, in_features: int) -> int | None:
    """The largest group of the kernel that divides both the weight's group and K, or None."""
    return next((g for g in CPU_GROUPS if group_size % g == 0 and in_features % g == 0), None)


def runs_cpu_int4(facts: WeightFacts, dtype: str) -> bool:
    """Whether torch's int4 kernel takes the weight; else it is expanded."""
    return dtype == "bfloat16" and cpu_group(facts.group_size, facts.in_features) is not None


def cpu_int4_bytes(bits: int, in_features: int, out_features: int, group_size: int) -> int:
    """Codes, scales and zeros in torch's layout."""
    group = cpu_group(group_size, in_features)
    assert group is not None, "ask runs_cpu_int4 first"
    columns = out_features + -out_features % CPU_COLUMNS
    table_rows = bits // 4 * in_features // group
    # A row of the table is a scale and a zero in bfloat16.
    return columns * (in_features * bits // 8 + table_rows * 4)


# Our own kernels for the CPU


def native_group(group_size: int, in_features: int) -> int | None:
    """Inputs that share a scale in the layout: the weight's group, or a part of it that divides K too; None if none."""
    if in_features % CHUNK:
        return None
    if group_size >= in_features:
        return in_features
    if group_size % CHUNK == 0 and in_features % group_size == 0:
        return group_size
    return cpu_group(group_size, in_features)


def runs_native(facts: WeightFacts, dtype: str) -> bool:
    """Whether our own kernels for the CPU take the weight; else torch's are asked."""
    return dtype == "bfloat16" and native_group(facts.group_size, facts.in_features) is not None


def native_bytes(bits: int, in_features: int, out_features: int, group: int, table_bytes: int) -> int:
    """Codes and tables; `table_bytes` of a scale and its zero point or min."""
    columns = out_features + -out_features % CPU_COLUMNS
    return columns * (in_features * bits // 8 + in_features // group * table_bytes)


def _native_held(facts: WeightFacts) -> int:
    assert facts.bits is not None, "asked for quantized weights only"
    group = native_group(facts.group_size, facts.in_features)
    assert group is not None, "ask runs_native first"
    scale = DTYPE_BYTES[facts.scale_dtype]
    zero = scale if facts.has_mins else 1 if facts.zero_const is None else 0
    return native_bytes(facts.bits, facts.in_features, facts.out_features, group, scale + zero)


#: Rows that a stack of layers takes at once, rows and keys of an attention item, and alignment (see `native/src/`).
_STACK_ROWS, _ITEM_ROWS, _TILE_KEYS, _ALIGNMENT = 256, 48, 32, 64


def native_linear_room(rows: int, widest_input: int, num_threads: int) -> int:
    """Scratch of one linear, as `qk_linear_room` asks for it: quantized rows, and two in float32 for each thread.

    Args:
        widest_input: the larger of the columns of x and the rows of the weight, padding included.
    """
    return _native_rows(rows, widest_input) + num_threads * 2 * widest_input * 4 + _ALIGNMENT


def native_stack_room(
    rows: int, widest_input: int, intermediate: int, heads: tuple[int, int, int], num_threads: int
) -> int:
    """Scratch of all layers, as `qk_stack_room` asks for it for a step of `rows` tokens.

    Args:
        widest_input: of any linear of the layers, padding included.
        heads: of queries, of keys, and the numbers of each.
    """
    num_heads, num_kv_heads, head_dim = heads
    rows = min(rows, _STACK_ROWS)
    widest_result = max((num_heads + 2 * num_kv_heads) * head_dim, 2 * intermediate)
    attention = head_dim * (2 * _ITEM_ROWS + 2 * _TILE_KEYS) + _TILE_KEYS * _ITEM_ROWS
    thread = -(-max(2 * widest_input, attention) // 16) * 16
    floats = rows * (widest_result + num_heads * head_dim) + num_threads * thread
    quantized = _native_rows(rows, widest_input) + _native_rows(rows, intermediate)
    return quantized + 4 * floats + 4 * _ALIGNMENT


def _native_rows(rows: int, inputs: int) -> int:
    """16-bit integers, and for every chunk a scale and a sum."""
    return 2 * rows * inputs + rows * inputs // CHUNK * 8 + 2 * _ALIGNMENT


# Triton's kernels


@dataclass(frozen=True, slots=True)
class P16Groups:
    """How the tables of a P16 weight are cut; see `scheme.Scheme`."""

    num_tables: int
    groups: int
    blocks_per_group: int


def runs_p16(facts: WeightFacts, dtype: str) -> bool:
    """Whether P16 holds the weight; else it is expanded.

    Scales of 32 bits seldom have a 16-bit twin, and only the data can tell: they count as expanded.
    """
    if DTYPE_BYTES[dtype] != 2 or DTYPE_BYTES[facts.scale_dtype] != 2 or (facts.bits == 8 and facts.has_mins):
        return False
    return facts.is_one_group or facts.group_size % P16_ROWS == 0


def _p16_groups(facts: WeightFacts) -> P16Groups:
    assert facts.bits is not None, "asked for quantized weights only"
    if facts.is_one_group and not facts.has_mins:
        return P16Groups(facts.num_tables, 1, 0)
    size = P16_ROWS * 4 if facts.is_one_group else math.gcd(facts.group_size, P16_ROWS * 4)
    block = P16_ROWS * 16 // facts.bits
    return P16Groups(facts.num_tables, max(1, block // size), max(1, size // block))


def p16_parts(bits: int, in_features: int, out_features: int, tables: P16Groups) -> tuple[int, ...]:
    """Bytes of the words, and of each table of the P16 layout, padding included."""
    num_blocks = -(-in_features // (P16_ROWS * 16 // bits))
    columns = out_features + -out_features % P16_COLUMNS
    rows = -(-num_blocks // tables.blocks_per_group) if tables.blocks_per_group else 1
    # Words and fields of tables have 16 bits; every table ends with one more row.
    table = 2 * columns * (rows + 1) * tables.groups
    return (2 * columns * num_blocks * P16_ROWS, *[table] * tables.num_tables)


def p16_bytes(bits: int, in_features: int, out_features: int, tables: P16Groups) -> int:
    """All of them."""
    return sum(p16_parts(bits, in_features, out_features, tables))


# The KV cache

#: Keys and values that attention on a CPU gathers at a time, of sequences with one token each; a longer one has more.
GATHER_BYTES = 64 * 2**20
#: Bytes of a number that was decoded, which is float32, with its copies in other orders.
_DECODED_BYTES = 3 * 4


def kv_number_bytes(name: str, dtype: str) -> tuple[int, int]:
    """Bytes of a number in the cache, and of a scale per token and head (0 without), by the user's name for it.

    Args:
        name: "auto" keeps the compute dtype.
        dtype: the compute dtype.
    """
    if name in ("int8", "fp8", "fp8_e4m3"):
        return 1, 2
    return (1, 0) if name == "fp8_e5m2" else (DTYPE_BYTES[dtype if name == "auto" else name], 0)


def kv_bytes_per_token(num_kv_heads: int, head_dim: int, number_bytes: int, scale_bytes: int) -> int:
    """Bytes that one token takes in one layer: keys, values and their scales."""
    return 2 * num_kv_heads * (head_dim * number_bytes + scale_bytes)


def gathered_bytes_per_token(num_kv_heads: int, head_dim: int, number_bytes: int) -> int:
    """Bytes that a token's keys and values in one layer take while they are gathered on a CPU, at most.

    Args:
        number_bytes: of a number in the cache; one byte stands for numbers that are decoded.
    """
    return 2 * num_kv_heads * head_dim * (_DECODED_BYTES if number_bytes == 1 else number_bytes)


def gathered_bytes(num_kv_heads: int, head_dim: int, number_bytes: int, longest: int) -> int:
    """The same for one call of attention: a slice of many sequences, or one of `longest` tokens."""
    return max(GATHER_BYTES, longest * gathered_bytes_per_token(num_kv_heads, head_dim, number_bytes))
