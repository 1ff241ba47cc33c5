"""Bit packing of PackedWeight codes, and the operations on whole records that need no arithmetic.

Concatenating records along N fuses qkv and gate_up; reordering the outputs of one linear saves reordering the inputs of
the next; `sharding` cuts records. Invariant: nothing here rounds; unpack(pack(x)) == x. It reads no files and prepares
no device layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from quant_kernels.packed_weight import CODES_PER_WORD, PADDING, DenseWeight, PackedWeight


def unpack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 words [K * bits / 32, N] to uint8 codes [K, N]. Word r holds rows r*32/bits and up, LSB first."""
    per_word = CODES_PER_WORD[bits]
    shifts = torch.arange(per_word, dtype=torch.int32, device=codes.device) * bits
    spread: torch.Tensor = (codes.unsqueeze(1) >> shifts.view(1, -1, 1)) & (2**bits - 1)
    return spread.to(torch.uint8).reshape(codes.shape[0] * per_word, codes.shape[1])


def pack_codes(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [K, N] (any integer dtype, below 2**bits) to int32 words [K * bits / 32, N], LSB first along K."""
    per_word = CODES_PER_WORD[bits]
    rows, columns = values.shape
    spread = values.reshape(rows // per_word, per_word, columns).to(torch.int32)
    words = spread[:, 0].clone()
    for item in range(1, per_word):
        # The last item reaches the sign bit: int32 is a container of bits here.
        words |= spread[:, item] << (bits * item)
    return words


def gather_rows(codes: torch.Tensor, bits: int, order: torch.Tensor) -> torch.Tensor:
    """Packed codes whose row i is row ``order[i]`` of `codes`; order int64, whole words of rows."""
    per_word = CODES_PER_WORD[bits]
    gathered = codes.new_zeros(len(order) // per_word, codes.shape[1])
    for item in range(per_word):
        source = order[item::per_word]
        shifts = ((source % per_word) * bits).to(torch.int32).unsqueeze(1)
        fields = (codes[source // per_word] >> shifts) & (2**bits - 1)
        gathered |= fields << (bits * item)
    return gathered


def input_places(perm: torch.Tensor) -> torch.Tensor:
    """int64 [inputs]: the row of a record that input i of its layer feeds; the inverse of `perm`, less its padding."""
    order = torch.argsort(perm, stable=True)
    return order[int((perm == PADDING).sum()) :]


def expand_zeros(weight: PackedWeight) -> torch.Tensor:
    """The integer zero points as uint8 [G, N], whether stored as one constant or as a table."""
    if weight.zeros is not None:
        return weight.zeros
    assert weight.zero_const is not None, "only records with integer zero points have zeros"
    shape = (weight.num_groups, weight.out_features)
    return torch.full(shape, weight.zero_const, dtype=torch.uint8, device=weight.scales.device)


def can_concat(parts: Sequence[PackedWeight]) -> tuple[bool, str]:
    """Whether records can be fused along N, and why not."""
    first = parts[0]
    for part in parts[1:]:
        if (part.bits, part.in_features) != (first.bits, first.in_features):
            return False, f"bits or input sizes differ ({first.bits}/{part.bits} bits)"
        if part.group_size != first.group_size:
            return False, f"group sizes differ ({first.group_size} and {part.group_size})"
        if (part.perm is None) != (first.perm is None):
            return False, "only some parts have an activation order"
        if part.perm is not None and first.perm is not None and not torch.equal(part.perm, first.perm):
            return False, "the parts have different activation orders"
        if (part.mins is None, part.codebook is None) != (first.mins is None, first.codebook is None):
            return False, "the parts store their zero points differently"
        if part.scales.dtype != first.scales.dtype:
            return False, f"scale dtypes differ ({first.scales.dtype} and {part.scales.dtype})"
        if part.codebook is not None and first.codebook is not None and not torch.equal(part.codebook, first.codebook):
            return False, "the parts have different codebooks"
    return True, ""


def concat_outputs(parts: Sequence[PackedWeight], *, with_codes: bool = True) -> PackedWeight:
    """Fuse records along N into one. Exact; the parts must satisfy `can_concat`.

    Args:
        with_codes: False leaves them on the meta device, for who takes them from the parts.
    """
    fusable, reason = can_concat(parts)
    if not fusable:
        raise ValueError(f"cannot fuse: {reason}")
    first = parts[0]
    same_const = all(p.zero_const is not None and p.zero_const == first.zero_const for p in parts)
    integer_zeros = first.mins is None and first.codebook is None
    return PackedWeight(
        bits=first.bits,
        codes=side_by_side([p.codes for p in parts]) if with_codes else _no_codes(parts),
        scales=torch.cat([p.scales for p in parts], dim=1),
        group_size=first.group_size,
        in_features=first.in_features,
        out_features=sum(p.out_features for p in parts),
        zero_const=first.zero_const if same_const else None,
        zeros=torch.cat([expand_zeros(p) for p in parts], dim=1) if integer_zeros and not same_const else None,
        mins=_concat_optional([p.mins for p in parts]),
        codebook=first.codebook,
        perm=first.perm,
        bias=concat_biases([p.bias for p in parts], [p.out_features for p in parts]),
        origin=first.origin,
    )


def _no_codes(parts: Sequence[PackedWeight]) -> torch.Tensor:
    # Made, not concatenated: the first operation on the meta device costs a second of imports.
    shape = (len(parts[0].codes), sum(p.out_features for p in parts))
    return torch.empty(shape, dtype=torch.int32, device="meta")


def side_by_side(codes: Sequence[torch.Tensor]) -> torch.Tensor:
    """Codes of neighbouring outputs as one tensor, in memory that numpy asks huge pages for: faults on small ones take
    as long as the copy."""
    if len(codes) == 1:
        return codes[0]
    if any(c.device.type != "cpu" for c in codes):
        return torch.cat(list(codes), dim=1)
    shape = (len(codes[0]), sum(c.shape[1] for c in codes))
    out = torch.from_numpy(np.empty(shape, np.int32))
    return torch.cat(list(codes), dim=1, out=out)


def concat_biases(biases: Sequence[torch.Tensor | None], sizes: Sequence[int]) -> torch.Tensor | None:
    """Biases side by side; parts without one get zeros; None if no part has one."""
    known = [b for b in biases if b is not None]
    if not known:
        return None
    filled = [b if b is not None else known[0].new_zeros(n) for b, n in zip(biases, sizes, strict=True)]
    return torch.cat(filled)


def _concat_optional(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    present = [t for t in tensors if t is not None]
    return torch.cat(present, dim=1) if present else None


def select_outputs(weight: PackedWeight | DenseWeight, order: torch.Tensor) -> PackedWeight | DenseWeight:
    """A linear whose output i is output order[i] of `weight`: all of them reordered, or some. order: int64."""
    bias = None if weight.bias is None else weight.bias[order]
    if isinstance(weight, DenseWeight):
        return DenseWeight(weight.weight[order], bias)
    return replace(
        weight,
        codes=weight.codes[:, order],
        scales=weight.scales[:, order],
        zeros=None if weight.zeros is None else weight.zeros[:, order],
        mins=None if weight.mins is None else weight.mins[:, order],
        out_features=len(order),
        bias=bias,
    )


def fold_input_order(
    weight: PackedWeight | DenseWeight, producers: Sequence[PackedWeight | DenseWeight]
) -> tuple[PackedWeight | DenseWeight, list[PackedWeight | DenseWeight]]:
    """Move a linear's activation order into the outputs of the linears that make its input.

    Right where everything between them works on each number alone, as between gate and up and down of a gated MLP:
    the activations then arrive in the order in which the rows are stored. Exact.

    Returns:
        The linear without `perm`, and the producers; all of them as they were if there is no `perm`.
    """
    folded, order = take_input_order(weight)
    return folded, [producer if order is None else select_outputs(producer, order) for producer in producers]


def take_input_order(weight: PackedWeight | DenseWeight) -> tuple[PackedWeight | DenseWeight, torch.Tensor | None]:
    """A linear without its activation order, and the order (int64 [K]) that its producers' outputs must be put in."""
    if isinstance(weight, DenseWeight) or weight.perm is None:
        return weight, None
    return replace(weight, perm=None), weight.perm.long()
