"""PackedWeight: the one in-memory record of a quantized linear, whatever file it came from.

A linear computes ``y[m, n] = sum_k x[m, k] * W[k, n] + bias[n]``. The record keeps the integer codes of W exactly as
the file had them, so nothing is lost on the way in and a re-export is bit-exact::

    W[k, n] = (Q[k, n] - Z[g, n]) * S[g, n]     integer zero points (zero_const or zeros)
    W[k, n] =  Q[k, n] * S[g, n] + min[g, n]    float mins (GGUF Q4_1, Q4_K)
    W[k, n] =  codebook[Q[k, n]] * S[g, n]      non-uniform codes
    g = k // group_size

Codes are packed along k, least significant bits first. One 4-bit word holds eight rows of one column::

    codes[r, n]   bit 31                                                         0
                  | Q[8r+7,n] | Q[8r+6,n] | ... | Q[8r+2,n] | Q[8r+1,n] | Q[8r,n] |

Invariant: exactly one of ``zero_const``, ``zeros``, ``mins``, ``codebook`` is set. If ``perm`` is set (activation
order), row i of the record is row ``perm[i]`` of the layer: feed it ``x[:, perm]``. A row of padding, whose entry there
is `PADDING`, is fed zeros; its code says nothing. Only parts of a weight that was cut for several ranks have such rows.
This module does not compute: see `reference` for the specification and `linear/` for what runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

CODES_PER_WORD = {4: 8, 8: 4}
#: In `perm`: a row that belongs to no input.
PADDING = -1


@dataclass(frozen=True, slots=True)
class DenseWeight:
    """A linear that is not quantized: ``weight`` float [out, in], ``bias`` float [out] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def in_features(self) -> int:
        return int(self.weight.shape[1])

    @property
    def out_features(self) -> int:
        return int(self.weight.shape[0])


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A quantized linear. K = in_features, N = out_features, G = ceil(K / group_size).

    Attributes:
        in_features: rows of `codes`, those of padding among them; `num_inputs` is what the layer is fed.
        bits: 4 or 8.
        codes: int32 [K * bits / 32, N], unsigned codes, packed along K, LSB first.
        scales: float [G, N], in the dtype the file had.
        group_size: rows of K that share a scale; the last group may be short. K itself for one group.
        zero_const: one integer zero point for all, or None.
        zeros: uint8 [G, N] integer zero points, or None.
        mins: float [G, N], the float value of code 0, or None.
        codebook: float [2**bits], the value of each code before scaling, or None.
        perm: int32 [K], row i of `codes` is row perm[i] of the layer, or `PADDING`; None for natural order.
        bias: float [N] or None.
        origin: format name and what an exact re-export needs to know.

    Raises:
        ValueError: if shapes or dtypes contradict each other (a bug in a converter, never a user's fault).
    """

    bits: int
    codes: torch.Tensor
    scales: torch.Tensor
    group_size: int
    in_features: int
    out_features: int
    zero_const: int | None = None
    zeros: torch.Tensor | None = None
    mins: torch.Tensor | None = None
    codebook: torch.Tensor | None = None
    perm: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    origin: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.bits not in CODES_PER_WORD:
            raise ValueError(f"PackedWeight holds 4 or 8 bits, got {self.bits}")
        if self.in_features % CODES_PER_WORD[self.bits]:
            raise ValueError(f"in_features {self.in_features} does not fill whole words of {self.bits} bits")
        table = (self.num_groups, self.out_features)
        self._expect("codes", self.codes, (self.in_features * self.bits // 32, self.out_features), torch.int32)
        self._expect("scales", self.scales, table, None)
        self._expect("zeros", self.zeros, table, torch.uint8)
        self._expect("mins", self.mins, table, None)
        self._expect("codebook", self.codebook, (2**self.bits,), None)
        self._expect("perm", self.perm, (self.in_features,), torch.int32)
        self._expect("bias", self.bias, (self.out_features,), None)
        given = [v is not None for v in (self.zero_const, self.zeros, self.mins, self.codebook)]
        if sum(given) != 1:
            raise ValueError("exactly one of zero_const, zeros, mins, codebook must be given")

    @property
    def num_groups(self) -> int:
        """Number of scale rows, G."""
        return -(-self.in_features // self.group_size)

    @property
    def num_inputs(self) -> int:
        """Columns of the layer's x: rows less those of padding."""
        return self.in_features if self.perm is None else int((self.perm != PADDING).sum())

    @property
    def num_bytes(self) -> int:
        """Bytes this record keeps in memory."""
        parts = (self.codes, self.scales, self.zeros, self.mins, self.codebook, self.perm, self.bias)
        return sum(t.numel() * t.element_size() for t in parts if t is not None)

    @staticmethod
    def _expect(name: str, tensor: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
        if tensor is None:
            return
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
        if dtype is not None and tensor.dtype != dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}, expected {dtype}")
        if dtype is None and not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}, expected a float type")
