"""The P16 layout: int16 words whose codes lie a plane apart along the inputs.

A block is 32 rows of words. Word r of a block of 4-bit codes holds the inputs r, r + 32, r + 64 and r + 96, so the
words of a block are four planes of 32 inputs, one on top of the other; 8-bit codes make two planes::

    4 bits, block b of 128 inputs        bit 15        11          7           3         0
    words[32 b + r, n]                   | Q[b, r+96] | Q[b, r+64] | Q[b, r+32] | Q[b, r] |    Q[b, i] = Q[128 b + i, n]

    8 bits, block b of 64 inputs         bit 15                    7                     0
    words[32 b + r, n]                   |        Q[b, r+32]       |       Q[b, r]       |    Q[b, i] = Q[64 b + i, n]

Masking a word in place gives whole planes, so a kernel never moves a code between lanes (`planes`), and 16-bit words
reach the tensor cores' operand layout by the hardware's own transposing load. K is padded to whole blocks and N to 128;
padded codes are zero and their scales too.

Scales, zero points and mins are tables of 16-bit fields, one per group and column. The fields of the groups that
share a block share a word, lowest group first, so one load per block and column fetches them all::

    groups in a block     1                 2                  4
    table                 fp16 or bf16      int32 [g1 | g0]    int64 [g3 | g2 | g1 | g0]

A group larger than a block has its row repeated, or, if it is all of K, one row that is applied after the sum. Each
table ends with a row of zeros, which lets a kernel ask for the next block's row without looking whether there is one.

Invariant: `unpack(pack(w)) == w`, bit for bit. Nothing here computes with weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from quant_kernels.footprint import P16Groups, p16_bytes
from quant_kernels.packed_weight import PackedWeight
from quant_kernels.scheme import ACTIVATION_DTYPES, COLUMN_MULTIPLE, PLANE_ROWS, Scheme, ZeroKind

#: A layer is converted in at least this many slices of columns, or the memory beside it would exceed its own.
_SLICES = 8
_TABLE_DTYPES = {2: torch.int32, 4: torch.int64}


@dataclass(frozen=True, slots=True)
class P16Weight:
    """A quantized linear on its device. Kp, Np: K and N padded.

    Attributes:
        words: int16 [Kp * bits / 16, Np].
        scales: [blocks or 1, plus 1, Np]; see above.
        offsets: zero points or mins, laid out as `scales`; None without either.
        perm: int32 [K]: row i is input perm[i] of the layer. Kernels expect x[:, perm].
        bias: float [N] or None.
        source: the record without its tensors: what `unpack` needs to know.
    """

    scheme: Scheme
    words: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None
    in_features: int
    out_features: int
    perm: torch.Tensor | None
    bias: torch.Tensor | None
    source: Source

    @property
    def num_blocks(self) -> int:
        """Blocks of 32 words along K."""
        return int(self.words.shape[0]) // PLANE_ROWS

    @property
    def num_bytes(self) -> int:
        """Bytes of device memory held."""
        parts = (self.words, self.scales, self.offsets, self.perm, self.bias)
        return sum(t.numel() * t.element_size() for t in parts if t is not None)

    @property
    def bytes_per_pass(self) -> int:
        """Bytes that one multiplication must read: words and tables."""
        parts = (self.words, self.scales, self.offsets)
        return sum(t.numel() * t.element_size() for t in parts if t is not None)


@dataclass(frozen=True, slots=True)
class Source:
    """Facts of the PackedWeight that its P16 form does not show: group size, codebook, the tables' dtypes, origin."""

    group_size: int
    codebook: torch.Tensor | None
    scale_dtype: torch.dtype
    min_dtype: torch.dtype | None
    origin: dict[str, str]


def can_pack(weight: PackedWeight, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether P16 can hold the record for activations of `dtype`, and why not."""
    if dtype not in ACTIVATION_DTYPES:
        return False, f"the tensor cores' path takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if weight.bits == 8 and zero_kind(weight) in (ZeroKind.MIN, ZeroKind.CODEBOOK):
        return False, f"8-bit codes with {'mins' if weight.mins is not None else 'a codebook'} have no kernel"
    if not _is_one_group(weight) and math.gcd(weight.group_size, PLANE_ROWS) != PLANE_ROWS:
        return False, f"group size {weight.group_size} is not a multiple of {PLANE_ROWS}"
    if _table_dtype(weight) is None:
        return False, "scales are values that no 16-bit type holds"
    return True, ""


def zero_kind(weight: PackedWeight) -> ZeroKind:
    """Which of the four ways of making a weight from its code the record uses."""
    if weight.codebook is not None:
        return ZeroKind.CODEBOOK
    if weight.mins is not None:
        return ZeroKind.MIN
    return ZeroKind.CONST if weight.zeros is None else ZeroKind.INTEGER


def scheme_of(weight: PackedWeight, dtype: torch.dtype) -> Scheme:
    """How the record will be stored. Ask `can_pack` first."""
    kind, block = zero_kind(weight), PLANE_ROWS * 16 // weight.bits
    # Mins are added to weights, not to sums, so they always come block by block; codebooks share their kernels.
    if _is_one_group(weight) and kind in (ZeroKind.CONST, ZeroKind.INTEGER):
        groups, blocks_per_group = 1, 0
    else:
        size = _stored_group(weight)
        groups, blocks_per_group = max(1, block // size), max(1, size // block)
    scale_dtype = _table_dtype(weight)
    assert scale_dtype is not None, "ask can_pack first"
    codebook = None
    if weight.codebook is not None:
        codebook = tuple(float(v) for v in weight.codebook.to(dtype).float())
    middle = 2 ** (weight.bits - 1)
    return Scheme(
        bits=weight.bits,
        groups=groups,
        blocks_per_group=blocks_per_group,
        zero=kind,
        zero_value=middle if weight.zero_const is None else weight.zero_const,
        scale_dtype=scale_dtype,
        dtype=dtype,
        codebook=codebook,
    )


def stored_bytes(weight: PackedWeight, dtype: torch.dtype) -> int:
    """What `P16Weight.bytes_per_pass` of the packed record is, by its sizes alone. Ask `can_pack` first."""
    scheme = scheme_of(weight, dtype)
    num_tables = 1 if scheme.zero in (ZeroKind.CONST, ZeroKind.CODEBOOK) else 2
    tables = P16Groups(num_tables, scheme.groups, scheme.blocks_per_group)
    return p16_bytes(weight.bits, weight.in_features, weight.out_features, tables)


def pack(weight: PackedWeight, dtype: torch.dtype, device: torch.device) -> P16Weight:
    """Lay the record out on `device` for activations of `dtype`, a slice of columns at a time.

    Raises:
        ValueError: if `can_pack` says no.
    """
    possible, reason = can_pack(weight, dtype)
    if not possible:
        raise ValueError(f"cannot pack as P16: {reason}")
    scheme = scheme_of(weight, dtype)
    num_blocks = -(-weight.in_features // scheme.block_inputs)
    columns = weight.out_features + -weight.out_features % COLUMN_MULTIPLE
    words = torch.zeros(num_blocks * PLANE_ROWS, columns, dtype=torch.int16, device=device)
    slices = _slices(weight.out_features)
    for first in slices:
        codes = weight.codes[:, first : first + slices.step].to(device)
        words[:, first : first + codes.shape[1]] = _words(codes, weight.bits, num_blocks)
    offsets = weight.mins
    if weight.zeros is not None:
        offsets = weight.zeros.to(dtype)
    return P16Weight(
        scheme=scheme,
        words=words,
        scales=_table(weight.scales.to(scheme.scale_dtype), weight, scheme, num_blocks, columns).to(device),
        offsets=None if offsets is None else _offsets(offsets, weight, scheme, num_blocks, columns).to(device),
        in_features=weight.in_features,
        out_features=weight.out_features,
        perm=None if weight.perm is None else weight.perm.to(device),
        bias=None if weight.bias is None else weight.bias.to(device),
        source=Source(
            group_size=weight.group_size,
            codebook=weight.codebook,
            scale_dtype=weight.scales.dtype,
            min_dtype=None if weight.mins is None else weight.mins.dtype,
            origin=weight.origin,
        ),
    )


def unpack(packed: P16Weight) -> PackedWeight:
    """The record that was packed, on the device that holds it."""
    scheme, source = packed.scheme, packed.source
    scales = _rows(packed.scales, packed, scheme.scale_dtype).to(source.scale_dtype)
    zeros = mins = None
    if packed.offsets is not None and scheme.zero == ZeroKind.INTEGER:
        zeros = _rows(packed.offsets, packed, scheme.dtype).to(torch.uint8)
    elif packed.offsets is not None:
        mins = _rows(packed.offsets, packed, scheme.scale_dtype).to(source.min_dtype)
    return PackedWeight(
        bits=scheme.bits,
        codes=_codes(packed),
        scales=scales,
        group_size=source.group_size,
        in_features=packed.in_features,
        out_features=packed.out_features,
        zero_const=scheme.zero_value if scheme.zero == ZeroKind.CONST else None,
        zeros=zeros,
        mins=mins,
        codebook=source.codebook,
        perm=packed.perm,
        bias=packed.bias,
        origin=source.origin,
    )


def _is_one_group(weight: PackedWeight) -> bool:
    return weight.group_size >= weight.in_features


def _stored_group(weight: PackedWeight) -> int:
    """The largest group of the kernels that divides the record's: 32, 64 or 128; all of K counts as 128."""
    return PLANE_ROWS * 4 if _is_one_group(weight) else math.gcd(weight.group_size, PLANE_ROWS * 4)


def _table_dtype(weight: PackedWeight) -> torch.dtype | None:
    """The 16-bit float type that holds every scale and min exactly, or None."""
    tables = [t for t in (weight.scales, weight.mins) if t is not None]
    exact = (d for d in ACTIVATION_DTYPES if all(torch.equal(t.to(d).to(t.dtype), t) for t in tables))
    same = (d for d in ACTIVATION_DTYPES if all(t.dtype == d for t in tables))
    return next(same, None) or next(exact, None)


def _slices(columns: int) -> range:
    """First columns of the slices that a layer is converted in, whole tiles each."""
    step = -(-columns // (_SLICES * COLUMN_MULTIPLE)) * COLUMN_MULTIPLE
    return range(0, columns, step)


def _words(codes: torch.Tensor, bits: int, num_blocks: int) -> torch.Tensor:
    """int32 words of a record [K * bits / 32, columns] to int16 words [num_blocks * 32, columns]."""
    planes, per_word = 16 // bits, 32 // bits
    rows_per_plane = PLANE_ROWS // per_word
    missing = num_blocks * planes * rows_per_plane - codes.shape[0]
    if missing:
        codes = torch.nn.functional.pad(codes, (0, 0, 0, missing))
    blocks = codes.view(num_blocks, planes, rows_per_plane, -1)
    words = torch.empty(num_blocks, rows_per_plane, per_word, codes.shape[1], dtype=torch.int16, device=codes.device)
    for item in range(per_word):
        # Item i of the words of a plane is every per_word-th input; the planes' items make one row of new words.
        values = (blocks >> (item * bits)) & (2**bits - 1)
        for plane in range(1, planes):
            values[:, 0] |= values[:, plane] << (plane * bits)
        words[:, :, item] = values[:, 0].to(torch.int16)
    return words.view(num_blocks * PLANE_ROWS, -1)


def _codes(packed: P16Weight) -> torch.Tensor:
    """The record's int32 words [K * bits / 32, N]: `_words` the other way, slice by slice."""
    bits, planes = packed.scheme.bits, packed.scheme.planes
    per_word = 32 // bits
    num_words = packed.in_features * bits // 32
    codes = torch.empty(num_words, packed.out_features, dtype=torch.int32, device=packed.words.device)
    slices = _slices(packed.out_features)
    for first in slices:
        words = packed.words[:, first : min(first + slices.step, packed.out_features)]
        blocks = words.reshape(packed.num_blocks, PLANE_ROWS // per_word, per_word, -1)
        shape = (packed.num_blocks, planes, PLANE_ROWS // per_word, words.shape[1])
        whole = torch.zeros(shape, dtype=torch.int32, device=words.device)
        for item in range(per_word):
            column = blocks[:, :, item].to(torch.int32)
            for plane in range(planes):
                whole[:, plane] |= ((column >> (plane * bits)) & (2**bits - 1)) << (item * bits)
        codes[:, first : first + words.shape[1]] = whole.view(-1, words.shape[1])[:num_words]
    return codes


def _offsets(
    offsets: torch.Tensor, weight: PackedWeight, scheme: Scheme, num_blocks: int, columns: int
) -> torch.Tensor:
    dtype = scheme.dtype if scheme.zero == ZeroKind.INTEGER else scheme.scale_dtype
    return _table(offsets.to(dtype), weight, scheme, num_blocks, columns)


def _table(values: torch.Tensor, weight: PackedWeight, scheme: Scheme, num_blocks: int, columns: int) -> torch.Tensor:
    """One value per group and column [G, N] to a table of words [rows + 1, columns]."""
    values = torch.nn.functional.pad(values, (0, columns - values.shape[1]))
    if scheme.blocks_per_group == 0:
        return torch.nn.functional.pad(values, (0, 0, 0, 1))
    stored = scheme.group_size
    repeats = -(-weight.in_features // stored) if _is_one_group(weight) else weight.group_size // stored
    rows = num_blocks * scheme.groups // scheme.blocks_per_group
    rows += num_blocks * scheme.groups % scheme.blocks_per_group > 0
    values = values.repeat_interleave(repeats, dim=0)[:rows]
    values = torch.nn.functional.pad(values, (0, 0, 0, rows - values.shape[0]))
    if scheme.groups > 1:
        fields = values.view(torch.int16).view(-1, scheme.groups, columns).to(_TABLE_DTYPES[scheme.groups]) & 0xFFFF
        values = fields[:, 0].clone()
        for index in range(1, scheme.groups):
            values |= fields[:, index] << (16 * index)
    return torch.nn.functional.pad(values, (0, 0, 0, 1))


def _rows(table: torch.Tensor, packed: P16Weight, dtype: torch.dtype) -> torch.Tensor:
    """A table of words back to one value per group and column of the record [G, N]."""
    scheme, source = packed.scheme, packed.source
    values = table[:-1, : packed.out_features]
    if scheme.groups > 1:
        fields = [(values >> (16 * index)).to(torch.int16) for index in range(scheme.groups)]
        values = torch.stack(fields, dim=1).flatten(0, 1).contiguous().view(dtype)
    if source.group_size >= packed.in_features:
        return values[:1].contiguous()
    num_groups = -(-packed.in_features // source.group_size)
    return values[:: source.group_size // scheme.group_size][:num_groups].contiguous()
