"""How one layer's keys and values lie in memory, whatever the device: plain floats, or bytes two to a word.

Plain caches are [num_blocks, block_size, num_kv_heads, head_dim] in their dtype. The one-byte kinds pair bytes into
int16 words so that a kernel unpacks two by masking a word where it is, and each half meets a matmul of its own::

    keys    int16 [num_blocks, block_size, num_kv_heads, head_dim / 2]      bit 15       8 7        0
        word (t, h, d)                                                      | K[t, d + D/2] | K[t, d] |
    values  int16 [num_blocks, block_size / 2, num_kv_heads, head_dim]
        word (r, h, d)                                                      | V[r + B/2, d] | V[r, d] |

    int8    byte - 128, times the scale          e4m3    sign, 4 bits of exponent, 3 of mantissa, times the scale
    e5m2    the upper byte of a float16, no scale

Scales are bfloat16 [num_blocks, num_kv_heads, block_size, 2], the key's and the value's of each token and head side by
side; they are rounded up, so that no number is cut off. Invariant: a code is made with the scale as stored, so reading
back is off by half a step at most. Which block belongs to whom is not known here.

int8's steps are as wide as the largest number of a key demands, and keys have a few large ones. So keys are turned by a
fixed orthogonal matrix that spreads them (Ashkboos et al. 2024, arXiv 2404.00456), and queries with them, which leaves
their products as they were: `turn`. Whoever writes an int8 cache turns both; whoever reads it need not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import torch

from quant_kernels.footprint import kv_bytes_per_token

#: The largest finite values of the two float8 types, and of a centred byte.
E4M3_MAX, E5M2_MAX, INT8_MAX = 448.0, 57344.0, 127.0
#: No scale is smaller: its logarithm and its inverse stay normal numbers. What it belongs to is zero for all purposes.
MIN_SCALE = 2.0**-100
_INT8_ZERO = 128


class KVKind(IntEnum):
    """How a number is made from what is stored."""

    PLAIN = 0
    INT8 = 1
    E4M3 = 2
    E5M2 = 3


@dataclass(frozen=True, slots=True)
class KVFormat:
    """What the cache holds.

    Attributes:
        name: as users write it.
        kind: how numbers are stored.
        dtype: of a plain cache; None for bytes.
    """

    name: str
    kind: KVKind
    dtype: torch.dtype | None = None

    @property
    def is_scaled(self) -> bool:
        """Whether every token and head has a scale."""
        return self.kind in (KVKind.INT8, KVKind.E4M3)

    @property
    def is_turned(self) -> bool:
        """Whether keys are stored turned, and queries must be."""
        return self.kind == KVKind.INT8

    def bytes_per_token(self, num_kv_heads: int, head_dim: int) -> int:
        """Bytes that one token takes in one layer: keys, values and their scales."""
        number = 1 if self.dtype is None else self.dtype.itemsize
        scale = torch.bfloat16.itemsize if self.is_scaled else 0
        return kv_bytes_per_token(num_kv_heads, head_dim, number, scale)


def plain(dtype: torch.dtype) -> KVFormat:
    """A cache of unquantized numbers."""
    return KVFormat(str(dtype).removeprefix("torch."), KVKind.PLAIN, dtype)


INT8 = KVFormat("int8", KVKind.INT8)
FP8_E4M3 = KVFormat("fp8_e4m3", KVKind.E4M3)
FP8_E5M2 = KVFormat("fp8_e5m2", KVKind.E5M2)
#: By the names that users give; "fp8" is what it is elsewhere.
KV_FORMATS: Mapping[str, KVFormat] = {
    **{f.name: f for f in (*map(plain, (torch.float16, torch.bfloat16, torch.float32)), INT8, FP8_E4M3, FP8_E5M2)},
    "fp8": FP8_E4M3,
}


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's keys and values; layouts as the module describes them. `scales` is None where there are none."""

    format: KVFormat
    keys: torch.Tensor
    values: torch.Tensor
    scales: torch.Tensor | None = None

    @property
    def block_size(self) -> int:
        return int(self.keys.shape[1])

    @property
    def head_dim(self) -> int:
        return int(self.values.shape[3])

    @property
    def num_kv_heads(self) -> int:
        return int(self.keys.shape[2])

    def parts(self) -> tuple[torch.Tensor, ...]:
        """All tensors, each with blocks along its first dimension."""
        return tuple(t for t in (self.keys, self.values, self.scales) if t is not None)


def cache_shapes(
    kv_format: KVFormat, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int
) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shape and dtype of keys, of values and, where there are any, of scales.

    Raises:
        ValueError: if bytes cannot be paired.
    """
    if kv_format.dtype is not None:
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        return ((shape, kv_format.dtype), (shape, kv_format.dtype))
    if block_size % 2:
        raise ValueError(f"block_size is {block_size}; a cache of {kv_format.name} pairs tokens, so it must be even")
    keys = ((num_blocks, block_size, num_kv_heads, head_dim // 2), torch.int16)
    values = ((num_blocks, block_size // 2, num_kv_heads, head_dim), torch.int16)
    scales = ((num_blocks, num_kv_heads, block_size, 2), torch.bfloat16)
    return (keys, values, scales) if kv_format.is_scaled else (keys, values)


def turned_together(head_dim: int) -> int:
    """Neighbouring numbers of each half of a head that `turn` mixes: the largest power of two that divides a half."""
    half = head_dim // 2
    return half & -half


@lru_cache
def turning(head_dim: int) -> torch.Tensor:
    """The orthogonal matrix of `turn`, float32 [head_dim, head_dim].

    Halves are added and subtracted, then groups of each half are mixed by a Hadamard matrix.
    """
    size = turned_together(head_dim)
    mix = torch.ones(1, 1)
    while len(mix) < size:
        mix = torch.cat([torch.cat([mix, mix], dim=1), torch.cat([mix, -mix], dim=1)])
    inner = torch.kron(torch.eye(head_dim // 2 // size), mix)
    both = torch.cat([torch.cat([inner, inner], dim=1), torch.cat([inner, -inner], dim=1)])
    matrix: torch.Tensor = both * (2.0 * size) ** -0.5
    return matrix


def turn(x: torch.Tensor) -> torch.Tensor:
    """x [..., head_dim] turned, in its own dtype: products of turned vectors are those of the vectors."""
    return (x.float() @ turning(x.shape[-1]).to(x.device)).to(x.dtype)


def encode(x: torch.Tensor, kv_format: KVFormat) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x [..., head_dim] as bytes of the same shape (uint8) and bfloat16 scales [...]; None without scales."""
    x = x.float()
    if kv_format.kind == KVKind.E5M2:
        # No NaN either: another sequence may come upon it in a word that it half owns.
        finite = x.nan_to_num(E5M2_MAX).clamp(-E5M2_MAX, E5M2_MAX)
        return finite.to(torch.float8_e5m2).view(torch.uint8), None
    largest = INT8_MAX if kv_format.kind == KVKind.INT8 else E4M3_MAX
    scales = _rounded_up((x.abs().amax(dim=-1) / largest).clamp_min(MIN_SCALE))
    quotients = x / scales.float().unsqueeze(-1)
    if kv_format.kind == KVKind.INT8:
        return (quotients.round() + _INT8_ZERO).to(torch.uint8), scales
    return quotients.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8), scales


def _rounded_up(x: torch.Tensor) -> torch.Tensor:
    """Numbers that are not negative, as the next bfloat16; NaN for what is not finite."""
    rounded = ((x.contiguous().view(torch.int32) + 0xFFFF) >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(x.isfinite(), rounded, torch.nan)


def decode(codes: torch.Tensor, kv_format: KVFormat, dtype: torch.dtype) -> torch.Tensor:
    """Bytes (uint8) as numbers, before their scale; exact in any float dtype."""
    if kv_format.kind == KVKind.INT8:
        return codes.to(dtype) - _INT8_ZERO
    return codes.view(torch.float8_e4m3fn if kv_format.kind == KVKind.E4M3 else torch.float8_e5m2).to(dtype)


def write(cache: LayerCache, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Store keys and values [rows, num_kv_heads, head_dim] at int64 slots [rows]."""
    if cache.format.dtype is not None:
        cache.keys.view(-1, *cache.keys.shape[2:]).index_copy_(0, slots, keys.to(cache.keys.dtype))
        cache.values.view(-1, *cache.values.shape[2:]).index_copy_(0, slots, values.to(cache.values.dtype))
        return
    size, half = cache.block_size, cache.block_size // 2
    blocks, tokens = slots // size, slots % size
    codes, scales = encode(keys, cache.format)
    _bytes(cache.keys)[blocks, tokens] = codes.view(*codes.shape[:-1], 2, -1).transpose(-1, -2)
    if scales is not None and cache.scales is not None:
        cache.scales[blocks, :, tokens, 0] = scales
    codes, scales = encode(values, cache.format)
    _bytes(cache.values)[blocks, tokens % half, :, :, tokens // half] = codes
    if scales is not None and cache.scales is not None:
        cache.scales[blocks, :, tokens, 1] = scales


def read(cache: LayerCache, blocks: torch.Tensor | slice, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of some blocks, each [blocks, block_size, num_kv_heads, head_dim] in `dtype`."""
    keys, values, *scales = (_select(part, blocks) for part in cache.parts())
    if cache.format.dtype is not None:
        return keys.to(dtype), values.to(dtype)
    halves = decode(_bytes(keys), cache.format, dtype)
    rows = decode(_bytes(values), cache.format, dtype)
    whole_keys = halves.transpose(-1, -2).flatten(-2)
    whole_values = rows.movedim(-1, 1).flatten(1, 2)
    if not scales:
        return whole_keys, whole_values
    by_token = scales[0].transpose(1, 2).to(dtype)
    return whole_keys * by_token[..., :1], whole_values * by_token[..., 1:]


def _bytes(words: torch.Tensor) -> torch.Tensor:
    """int16 words [...] as uint8 [..., 2], the low byte first."""
    return words.unsqueeze(-1).view(torch.uint8)


def _select(part: torch.Tensor, blocks: torch.Tensor | slice) -> torch.Tensor:
    return part[blocks] if isinstance(blocks, slice) else part.index_select(0, blocks)
