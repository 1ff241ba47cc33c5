"""GPTQ tensors to PackedWeight: 4 and 8 bits as they are, 2 and 3 bits widened to 4, all without rounding.

    qweight int32 [K * bits / 32, N]   packed along K, LSB first (3 bits: 32 values in a 96-bit little-endian stream)
    qzeros  int32 [G, N * bits / 32]   packed along N, the same way; v1 stores Z - 1, v2 stores Z
    scales  float [G, N]               g_idx int32 [K]: the group of each row, in any order (activation order)

W[k, n] = (Q[k, n] - Z[g_idx[k], n]) * scales[g_idx[k], n]. Invariant: shapes decide bits and group size; the
configuration only settles what shapes cannot (symmetric, v1 or v2). Source: AutoGPTQ and GPTQModel's packers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from converters.detect import QuantizationScheme
from converters.errors import CheckpointError
from quant_kernels.packed_weight import DenseWeight, PackedWeight
from quant_kernels.packing import pack_codes

_GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)
_PER_WORD = {2: 16, 4: 8, 8: 4}
_SAMPLE_WORDS = 64
#: Between a sound file's mean of q - Z, a few tenths at most, and the 1.0 of a shifted one.
_SHIFT_LIMIT = 0.7


@dataclass(frozen=True, slots=True)
class GPTQTensors:
    """The tensors of one linear, as read."""

    qweight: torch.Tensor
    scales: torch.Tensor
    qzeros: torch.Tensor | None = None
    g_idx: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def bits_from_shape(num_words: int, in_features: int) -> int | None:
    """Bits per code from qweight's rows, or None if they fit no supported width."""
    bits, rest = divmod(32 * num_words, in_features)
    return bits if not rest and bits in (2, 3, 4, 8) else None


def group_size_from_shape(num_groups: int, in_features: int, declared: int) -> int | None:
    """Rows per group: what was declared if the shape agrees, else the smallest usual size that gives that many."""
    if num_groups == 1:
        return in_features
    for size in (declared, *_GROUP_SIZES):
        if size > 0 and -(-in_features // size) == num_groups:
            return size
    return None


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [W, C] packed down the rows to uint8 codes [W * 32 / bits, C]."""
    if bits == 3:
        return _unpack_3(words)
    shifts = torch.arange(_PER_WORD[bits], dtype=torch.int32).view(1, -1, 1) * bits
    codes: torch.Tensor = (words.unsqueeze(1) >> shifts) & (2**bits - 1)
    return codes.reshape(-1, words.shape[1]).to(torch.uint8)


def _unpack_3(words: torch.Tensor) -> torch.Tensor:
    """Value i of a block of 32 is bits [3i, 3i + 3) of three words read as one little-endian stream."""
    stream = words.view(-1, 3, words.shape[1]).long() & 0xFFFFFFFF
    values = []
    for item in range(32):
        word, shift = divmod(3 * item, 32)
        value = stream[:, word] >> shift
        if shift > 29:
            value = value | (stream[:, word + 1] << (32 - shift))
        values.append(value & 7)
    return torch.stack(values, dim=1).reshape(-1, words.shape[1]).to(torch.uint8)


def _stored_zeros(qzeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Zero-point fields [G, N] as stored."""
    return unpack(qzeros.t().contiguous(), bits).t().contiguous()


def _add_one_to_words(qzeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Undo a subtraction of one from every field that was done on whole words, with its borrows."""
    ones = sum(1 << (bits * item) for item in range(32 // bits))
    words = (qzeros.long() & 0xFFFFFFFF) + ones & 0xFFFFFFFF
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _is_constant(stored: torch.Tensor, bits: int) -> bool:
    """Whether the fields are the symmetric constant, of v1 (less one) or v2."""
    first = int(stored.flatten()[0])
    return first in (2 ** (bits - 1) - 1, 2 ** (bits - 1)) and bool((stored == first).all())


def decode_zeros(
    qzeros: torch.Tensor | None, bits: int, scheme: QuantizationScheme
) -> tuple[int | None, torch.Tensor | None, str | None]:
    """(constant, table uint8 [G, N], warning): exactly one of the first two is set.

    Symmetric files get the constant whatever they store, since v1, v2 and mislabelled files all mean 2^(bits-1);
    unless their zero points differ among each other, which only an asymmetric layer has.
    """
    middle = 2 ** (bits - 1)
    if qzeros is None:
        return middle, None, None if scheme.sym else "asymmetric, but without qzeros: the middle code is taken as zero"
    stored = _stored_zeros(qzeros, bits)
    warning = None
    if scheme.sym:
        if _is_constant(stored, bits):
            return middle, None, None
        warning = "declared symmetric, but the zero points differ: read as asymmetric"
    if scheme.is_v2:
        return None, stored, warning
    if scheme.whole_word_zeros and bits != 3:
        return None, _stored_zeros(_add_one_to_words(qzeros, bits), bits), warning
    return None, (stored + 1) & (2**bits - 1), warning


def _looks_shifted(tensors: GPTQTensors, bits: int, group_size: int, zeros: torch.Tensor) -> bool:
    """Whether codes sit about one step off their zero points, as with the wrong convention, v1 for v2 or back.

    Weights average near zero, so q - Z does too. A sample of rows is enough.
    """
    codes = unpack(tensors.qweight[: 3 * _SAMPLE_WORDS if bits == 3 else _SAMPLE_WORDS], bits)
    if tensors.g_idx is not None:
        groups = tensors.g_idx[: len(codes)].long()
    else:
        groups = torch.arange(len(codes)) // group_size
    return abs(float((codes.float() - zeros[groups].float()).mean())) > _SHIFT_LIMIT


def row_order(g_idx: torch.Tensor | None, group_size: int, num_groups: int) -> tuple[torch.Tensor | None, bool, str]:
    """(perm int32 [K] or None, whether groups are regular, warning).

    Only the tensor counts, never desc_act: with static groups it is trivial although desc_act is true.
    """
    if g_idx is None:
        return None, True, ""
    groups = g_idx.long()
    natural = torch.arange(len(groups)) // group_size
    if num_groups == 1 or torch.equal(groups, natural):
        return None, True, ""
    if not bool(groups.any()):
        return None, True, "g_idx is all zeros although there are several groups: taken as natural order"
    perm = torch.argsort(groups, stable=True)
    return perm.to(torch.int32), torch.equal(groups[perm], natural), ""


def convert(
    name: str, tensors: GPTQTensors, in_features: int, scheme: QuantizationScheme
) -> tuple[PackedWeight | DenseWeight, list[str]]:
    """One linear, and what was odd about it.

    Raises:
        CheckpointError: for scales that are not finite, or a g_idx that names groups that do not exist.
    """
    bits = bits_from_shape(tensors.qweight.shape[0], in_features)
    num_groups, out_features = tensors.scales.shape
    group_size = group_size_from_shape(num_groups, in_features, scheme.group_size)
    assert bits is not None, "headers are checked before"
    assert group_size is not None, "headers are checked before"
    if not bool(tensors.scales.isfinite().all()):
        raise CheckpointError(f"{name}.scales holds NaN or infinity; the file is damaged, download it again")
    if tensors.g_idx is not None and not bool(((tensors.g_idx >= 0) & (tensors.g_idx < num_groups)).all()):
        raise CheckpointError(f"{name}.g_idx names groups outside 0 to {num_groups - 1}; the file is damaged")
    constant, zeros, zero_warning = decode_zeros(tensors.qzeros, bits, scheme)
    perm, is_regular, order_warning = row_order(tensors.g_idx, group_size, num_groups)
    warnings = [w for w in (zero_warning, order_warning) if w]
    if zeros is not None and _looks_shifted(tensors, bits, group_size, zeros):
        warnings.append("the codes do not center on the zero points; checkpoint_format (v1 or v2) may be mislabelled")
    if not is_regular:
        warnings.append("groups of unequal size: expanded to dense weights")
        return _dense(tensors, bits, constant, zeros), warnings
    codes = tensors.qweight
    if bits in (2, 3) or perm is not None:
        rows = unpack(tensors.qweight, bits)
        codes = pack_codes(rows if perm is None else rows[perm.long()], max(bits, 4))
    weight = PackedWeight(
        bits=max(bits, 4),
        codes=codes,
        scales=tensors.scales,
        group_size=group_size,
        in_features=in_features,
        out_features=out_features,
        zero_const=constant,
        zeros=zeros,
        perm=perm,
        bias=tensors.bias,
        origin={"format": "gptq", "bits": str(bits)},
    )
    return weight, warnings


def _dense(tensors: GPTQTensors, bits: int, constant: int | None, zeros: torch.Tensor | None) -> DenseWeight:
    """Exact float32 weights [N, K] for any g_idx."""
    assert tensors.g_idx is not None, "only an irregular g_idx needs this"
    group = tensors.g_idx.long()
    offset = torch.full_like(tensors.scales, constant or 0).float() if zeros is None else zeros.float()
    weight = (unpack(tensors.qweight, bits).float() - offset[group]) * tensors.scales.float()[group]
    return DenseWeight(weight.t().contiguous(), tensors.bias)
