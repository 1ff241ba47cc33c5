"""4-bit and 8-bit linears on the CPU, on torch's own int4 matmul in bfloat16.

torch's kernel computes ``W[k, n] = (Q[k, n] - 8) * scale[g, n] + zero[g, n]`` with a float zero, groups of 32, 64, 128
or 256, and N a multiple of 16. Every record maps onto that: integer zeros become ``zero = (8 - Z) * scale``, float mins
``zero = min + 8 * scale``, larger groups repeat their rows, N is padded with zero columns.
An 8-bit code is two 4-bit planes side by side along K, fed with x twice::

    Q = 16 * hi + lo          K:  | hi plane, scale 16 s | lo plane, scale s |

Invariant: the only rounding is that of scales and zeros to bfloat16 and of the kernel itself. Only bfloat16 is fast in
torch's kernel, so no other dtype is accepted here; activation order is one gather of x (`InputOrder`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from quant_kernels.footprint import CPU_COLUMNS, cpu_group, cpu_int4_bytes
from quant_kernels.linear import int4_layout
from quant_kernels.linear.order import InputOrder
from quant_kernels.linear.whole import WholeLinear
from quant_kernels.packed_weight import PackedWeight
from quant_kernels.packing import expand_zeros

_SLICE_COLUMNS = 2048


def kernel_group(weight: PackedWeight) -> int | None:
    """The largest kernel group that divides both the record's group and K, or None."""
    return cpu_group(weight.group_size, weight.in_features)


def can_run(weight: PackedWeight, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether this kernel can run the record, and why not."""
    if dtype != torch.bfloat16:
        return False, f"torch's int4 kernel is fast in bfloat16 only, not {str(dtype).removeprefix('torch.')}"
    if weight.codebook is not None:
        return False, "non-uniform codes have no CPU kernel"
    if kernel_group(weight) is None:
        return False, f"group size {weight.group_size} with {weight.in_features} inputs does not split into 32s"
    return True, ""


def stored_bytes(weight: PackedWeight) -> int:
    """What `CpuInt4Linear.bytes_per_pass` is for the record, by its sizes alone. Ask `can_run` first."""
    return cpu_int4_bytes(weight.bits, weight.in_features, weight.out_features, weight.group_size)


class CpuInt4Linear(WholeLinear):
    """A PackedWeight in torch's int4 layout. Weights [N', P * K / 2] bytes for P planes, N' = N rounded up to 16."""

    kernel = "cpu_int4"

    def __init__(self, weight: PackedWeight) -> None:
        group = kernel_group(weight)
        assert group is not None, "ask can_run first"
        self.in_features = weight.num_inputs
        self.out_features = weight.out_features
        self.group_size = group
        self.num_planes = weight.bits // 4
        padding = -weight.out_features % CPU_COLUMNS
        self._is_padded = padding > 0
        self.codes = _pack(weight, weight.out_features + padding)
        scales, zeros = _scales_and_zeros(weight, group)
        table = torch.stack([scales, zeros], dim=-1).bfloat16()
        self.scales_and_zeros = F.pad(table, (0, 0, 0, padding)) if self._is_padded else table
        self.order = None if weight.perm is None else InputOrder.of(weight.perm)
        self.bias = None if weight.bias is None else weight.bias.bfloat16()

    @property
    def num_bytes(self) -> int:
        order = None if self.order is None else self.order.index
        parts = (self.codes, self.scales_and_zeros, order, self.bias)
        return sum(t.numel() * t.element_size() for t in parts if t is not None)

    @property
    def bytes_per_pass(self) -> int:
        """Bytes that one multiplication must read: codes, scales and zeros."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scales_and_zeros))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [M, K] bfloat16 to [M, N] bfloat16."""
        if self.order is not None:
            x = self.order(x)
        if self.num_planes > 1:
            x = x.repeat(1, self.num_planes)
        y: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, self.codes, self.group_size, self.scales_and_zeros
        )
        if self._is_padded:
            y = y[:, : self.out_features]
        return y if self.bias is None else y + self.bias


def _pack(weight: PackedWeight, num_columns: int) -> torch.Tensor:
    """uint8 [num_columns, P * K / 2] in torch's layout, columns beyond N zero.

    What `int4_layout` does not know is torch's to pack: the columns after the last whole block, or all of them. That
    takes one int32 per code, eight times the result, so a slice of columns is converted at a time, which cuts none of
    the layout's blocks of up to 64 columns.
    """
    packed = torch.empty(num_columns, weight.in_features * weight.bits // 8, dtype=torch.uint8)
    block = int4_layout.block_columns()
    written = 0 if block is None else weight.out_features // block * block
    if block is not None and written:
        int4_layout.write(weight.codes[:, :written], weight.bits, block, packed[:written])
    for first in range(written, num_columns, _SLICE_COLUMNS):
        codes = _codes(weight.codes[:, first : first + _SLICE_COLUMNS], weight.bits)
        missing = min(_SLICE_COLUMNS, num_columns - first) - len(codes)
        codes = F.pad(codes, (0, 0, 0, missing)) if missing else codes
        packed[first : first + len(codes)] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return packed


def _codes(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [N, P * K] codes of 4 bits from words [K * bits / 32, N]; the high plane first where there are two."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes = ((words.t().contiguous().unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(1)
    return codes if bits == 4 else torch.cat([codes >> 4, codes & 15], dim=1)


def _scales_and_zeros(weight: PackedWeight, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 scales and zeros [P * K / group, N] in the kernel's formula."""
    scales = weight.scales.float()
    base = weight.mins.float() if weight.mins is not None else -expand_zeros(weight).float() * scales
    if weight.group_size != group:
        repeats, rows = weight.group_size // group, weight.in_features // group
        scales = scales.repeat_interleave(repeats, dim=0)[:rows]
        base = base.repeat_interleave(repeats, dim=0)[:rows]
    if weight.bits == 4:
        return scales, base + 8 * scales
    # base + s * (16 hi + lo) = 16 s (hi - 8) + s (lo - 8) + (base + 136 s); the constant goes with the low plane.
    zeros = torch.cat([torch.zeros_like(base), base + 136 * scales], dim=0)
    return torch.cat([16 * scales, scales], dim=0), zeros
