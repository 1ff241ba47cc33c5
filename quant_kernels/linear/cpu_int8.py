"""4-bit and 8-bit linears on the CPU, on our own kernels: activations in integers, weights as they are in the file.

Each row of x is quantized with a scale per 32 numbers, coarsely to int8, as llama.cpp does it, or finely to int16 where
errors show most. Products of codes are added up as integers, exactly, and a group's sum is multiplied by both scales in
float32. So a row's result does not depend on the others. Invariant: codes, zero points and scales are those of the
record, bit for bit (float32 scales stay float32).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from quant_kernels.footprint import native_bytes, native_group
from quant_kernels.linear.whole import WholeLinear
from quant_kernels.native.binding import Library
from quant_kernels.native.structures import COLUMNS, ScaleKind, Weight, ZeroKind
from quant_kernels.packed_weight import PackedWeight
from quant_kernels.packing import side_by_side

KERNEL = "cpu_int8"
_SCALES = {torch.float16: ScaleKind.FLOAT16, torch.bfloat16: ScaleKind.BFLOAT16, torch.float32: ScaleKind.FLOAT32}


def can_run(weight: PackedWeight, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether these kernels can run the record, and why not."""
    if dtype != torch.bfloat16:
        return False, f"the CPU's int8 kernels serve bfloat16, not {str(dtype).removeprefix('torch.')}"
    if weight.codebook is not None:
        return False, "non-uniform codes have no CPU kernel"
    if weight.scales.dtype not in _SCALES:
        return False, f"scales of {weight.scales.dtype} have no CPU kernel"
    if weight.mins is not None and weight.mins.dtype != weight.scales.dtype:
        return False, f"scales are {weight.scales.dtype} and mins {weight.mins.dtype}"
    if _group(weight) is None:
        return False, f"group size {weight.group_size} with {weight.in_features} inputs does not split into 32s"
    return True, ""


def stored_bytes(weight: PackedWeight) -> int:
    """What `CpuInt8Linear.bytes_per_pass` is for the record, by its sizes alone. Ask `can_run` first."""
    zero_bytes = 0 if weight.zero_const is not None else 1 if weight.zeros is not None else weight.scales.itemsize
    group = _group(weight)
    assert group is not None, "ask can_run first"
    return native_bytes(
        weight.bits, weight.in_features, weight.out_features, group, weight.scales.itemsize + zero_bytes
    )


class CpuInt8Linear(WholeLinear):
    """A PackedWeight in the layout of `native/src/qk.h`.

    Args:
        is_fine: multiply by activations of 15 bits and a sign, which takes half as long again; always with 8 bits.
        pieces: int32 [K * bits / 32, n] each, the codes of neighbouring outputs; none for the weight's own codes. So
            merged linears need not be copied side by side first.
    """

    kernel = KERNEL

    def __init__(
        self, weight: PackedWeight, library: Library, *, is_fine: bool = False, pieces: Sequence[torch.Tensor] = ()
    ) -> None:
        group = _group(weight)
        assert group is not None, "ask can_run first"
        self.in_features = weight.num_inputs
        self.out_features = weight.out_features
        self._library = library
        # numpy asks for huge pages: fewer faults while packing, and fewer misses of addresses in every pass.
        self.data = torch.from_numpy(np.empty(stored_bytes(weight), np.uint8))
        self.bias = None if weight.bias is None else weight.bias.float().contiguous()
        self.order = None if weight.perm is None else weight.perm.to(torch.int32).contiguous()
        mins = weight.mins is not None
        self.record = Weight(
            data=self.data.data_ptr(),
            bias=None if self.bias is None else self.bias.data_ptr(),
            order=None if self.order is None else self.order.data_ptr(),
            k=weight.in_features,
            n=weight.out_features,
            group=group,
            bits=weight.bits,
            scale_kind=_SCALES[weight.scales.dtype],
            zero_kind=ZeroKind.MIN if mins else ZeroKind.TABLE if weight.zeros is not None else ZeroKind.CONST,
            zero_const=weight.zero_const or 0,
            is_fine=is_fine or weight.bits == 8,
        )
        self._pack(weight, group, pieces or [weight.codes])

    def _pack(self, weight: PackedWeight, group: int, pieces: Sequence[torch.Tensor]) -> None:
        rows = len(weight.codes)
        if any(p.device.type != "cpu" or p.dtype != torch.int32 or len(p) != rows for p in pieces):
            raise ValueError(f"codes are {[tuple(p.shape) for p in pieces]}, expected int32 [{rows}, ..] on the CPU")
        if sum(piece.shape[1] for piece in pieces) != self.out_features:
            raise ValueError(
                f"codes are {[tuple(p.shape) for p in pieces]}, expected {self.out_features} columns in all"
            )
        zeros = weight.mins if weight.mins is not None else weight.zeros
        scales = _rows(weight.scales, weight, group)
        table = None if zeros is None else _rows(zeros, weight, group)
        if any(piece.shape[1] % COLUMNS for piece in pieces[:-1]):
            pieces = [side_by_side(pieces)]
        bytes_per_output = self.data.numel() // (-(-self.out_features // COLUMNS) * COLUMNS)
        first = 0
        for piece in pieces:
            end = first + piece.shape[1]
            record = Weight.from_buffer_copy(self.record)
            record.n = piece.shape[1]
            self._library.pack(
                record,
                self.data[first * bytes_per_output :],
                piece.contiguous(),
                scales[:, first:end].contiguous(),
                None if table is None else table[:, first:end].contiguous(),
            )
            first = end

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.data, self.order, self.bias) if t is not None)

    @property
    def bytes_per_pass(self) -> int:
        """Bytes that one multiplication must read: codes, scales and zeros."""
        return self.data.numel()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [M, K] to [M, N], both bfloat16."""
        return self._library.linear(self.record, x, self.in_features, torch.bfloat16)

    def in_float32(self, x: torch.Tensor) -> torch.Tensor:
        """The same, not rounded."""
        return self._library.linear(self.record, x, self.in_features, torch.float32)


def _group(weight: PackedWeight) -> int | None:
    """Inputs that share a scale in the layout: the record's group, or a part of it that divides K too; None if none."""
    return native_group(weight.group_size, weight.in_features)


def _rows(table: torch.Tensor, weight: PackedWeight, group: int) -> torch.Tensor:
    """A table [groups of the record, N] with a row per group of the layout."""
    if group != min(weight.group_size, weight.in_features):
        table = table.repeat_interleave(weight.group_size // group, dim=0)[: weight.in_features // group]
    return table.contiguous()
