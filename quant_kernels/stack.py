"""All layers of a decoder in one call: what a step costs between its matmuls is then threads meeting, not Python.

Between matmuls numbers are float32; keys and values are bfloat16 in the cache. Attention reads the paged cache where it
lies. Invariant: a row's result depends on its own sequence alone, not on the batch, the chunk or the threads, bit for
bit. Weights and caches are held here for as long as C knows their addresses.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from quant_kernels.attention.kv_format import LayerCache
from quant_kernels.linear.cpu_int8 import CpuInt8Linear
from quant_kernels.native.binding import Library
from quant_kernels.native.structures import ITEM_ROWS, MAX_HEAD_DIM, Layer, Stack
from quant_kernels.native.structures import Sequence as SequenceRecord
from quant_kernels.ops.base import Heads, StepInputs


@dataclass(frozen=True, slots=True)
class NativeInputs(StepInputs):
    """A step: its sequences, and their block ids one after the other, int32, which the sequences point into."""

    sequences: ctypes.Array[SequenceRecord]
    blocks: np.ndarray[tuple[int], np.dtype[np.int32]]
    num_rows: int
    end: int

    @classmethod
    def of(cls, spans: Sequence[tuple[int, int, Sequence[int]]]) -> NativeInputs:
        """From (start, num_tokens, block_ids) of each sequence; rows are laid out in this order."""
        tables = [block_ids for _, _, block_ids in spans]
        blocks = np.fromiter((i for ids in tables for i in ids), np.int32, sum(map(len, tables)))
        records = (SequenceRecord * len(spans))()
        row, address, end = 0, blocks.ctypes.data, 0
        for record, (start, count, block_ids) in zip(records, spans, strict=True):
            record.first_row, record.num_rows, record.start, record.blocks = row, count, start, address
            row += count
            address += len(block_ids) * blocks.itemsize
            end = max(end, start + count)
        return cls(records, blocks, row, end)


@dataclass(frozen=True, slots=True)
class StackLayer:
    """One layer's weights: linears of ours, norms [hidden] of any dtype."""

    qkv: CpuInt8Linear
    out: CpuInt8Linear
    gate_up: CpuInt8Linear
    down: CpuInt8Linear
    input_norm: torch.Tensor
    post_norm: torch.Tensor
    heads: Heads


def can_stack(hidden: int, intermediate: int, heads: Heads) -> tuple[bool, str]:
    """Whether the layers' sizes suit the kernels, and why not."""
    if hidden % 8 or intermediate % 8:
        return False, f"hidden size {hidden} and intermediate size {intermediate} are not both multiples of 8"
    if heads.head_dim % 8 or heads.head_dim > MAX_HEAD_DIM:
        return False, f"head_dim {heads.head_dim} is not a multiple of 8 up to {MAX_HEAD_DIM}"
    if heads.num_heads // heads.num_kv_heads > ITEM_ROWS:
        return False, f"more than {ITEM_ROWS} heads share a key"
    return True, ""


class LayerStack:
    """The layers and the norm after them.

    Args:
        final_norm: [hidden].
        norm_eps: of all norms but those of heads.
        cosines, sines: float32 [positions, head_dim / 2].
    """

    def __init__(
        self,
        library: Library,
        layers: Sequence[StackLayer],
        final_norm: torch.Tensor,
        norm_eps: float,
        cosines: torch.Tensor,
        sines: torch.Tensor,
    ) -> None:
        self.hidden = len(final_norm)
        self.intermediate = layers[0].gate_up.out_features // 2
        heads = layers[0].heads
        possible, reason = can_stack(self.hidden, self.intermediate, heads)
        if not possible:
            raise ValueError(reason)
        self.heads = heads
        self._library = library
        self._linears = [(layer.qkv, layer.out, layer.gate_up, layer.down) for layer in layers]
        self._norms = [(_floats(layer.input_norm), _floats(layer.post_norm)) for layer in layers]
        self._head_norms = [None if layer.heads.norms is None else _floats(layer.heads.norms) for layer in layers]
        self._final_norm = _floats(final_norm)
        self._angles = (_floats(cosines), _floats(sines))
        self._layers = (Layer * len(layers))()
        self._caches: Sequence[LayerCache] | None = None
        self._check(layers)
        for record, linears, norms, head_norms, layer in zip(
            self._layers, self._linears, self._norms, self._head_norms, layers, strict=True
        ):
            record.qkv, record.out, record.gate_up, record.down = (linear.record for linear in linears)
            record.input_norm, record.post_norm = (norm.data_ptr() for norm in norms)
            if head_norms is not None:
                record.query_norm, record.key_norm = (norm.data_ptr() for norm in head_norms)
            window = layer.heads.window
            record.window = 0 if window is None or window >= len(cosines) else window  # C counts positions in 32 bits.
        self._stack = Stack(
            layers=self._layers,
            final_norm=self._final_norm.data_ptr(),
            cosines=self._angles[0].data_ptr(),
            sines=self._angles[1].data_ptr(),
            num_layers=len(layers),
            hidden=self.hidden,
            intermediate=self.intermediate,
            num_heads=heads.num_heads,
            num_kv_heads=heads.num_kv_heads,
            head_dim=heads.head_dim,
            norm_eps=norm_eps,
            head_norm_eps=heads.norm_eps,
        )

    def room_bytes(self, rows: int, num_threads: int) -> int:
        """Bytes of scratch of a step of so many rows; `footprint.native_stack_room` knows them without a stack."""
        return self._library.stack_room(self._stack, rows, num_threads)

    def run(self, residual: torch.Tensor, caches: Sequence[LayerCache], inputs: NativeInputs) -> torch.Tensor:
        """Run a step; writes the caches. No sequence may read blocks that another one of the same step writes.

        Args:
            residual: float32 [rows, hidden], the embedded tokens; it is changed.
            caches: one per layer, of bfloat16.

        Returns:
            bfloat16 [rows, hidden], after the last norm.

        Raises:
            ValueError: if the arguments do not belong together (a bug of the caller's).
        """
        if caches is not self._caches:
            self._bind(caches)
        if residual.dtype != torch.float32 or residual.shape != (inputs.num_rows, self.hidden):
            raise ValueError(f"residual is {residual.dtype} {list(residual.shape)} for {inputs.num_rows} rows")
        if not residual.is_contiguous():
            raise ValueError("the residual must be contiguous")
        if inputs.end > len(self._angles[0]):
            raise ValueError(f"position {inputs.end - 1} is beyond the model's {len(self._angles[0])}")
        num_blocks = len(caches[0].keys)
        if inputs.blocks.min() < 0 or inputs.blocks.max() >= num_blocks:
            raise ValueError(f"block ids are not all in [0, {num_blocks})")
        _check_tables(inputs, caches[0].block_size)
        hidden = torch.empty(inputs.num_rows, self.hidden, dtype=torch.bfloat16)
        self._library.run_stack(self._stack, inputs.sequences, residual, hidden)
        return hidden

    def _check(self, layers: Sequence[StackLayer]) -> None:
        heads = self.heads
        attended = heads.num_heads * heads.head_dim
        qkv = attended + 2 * heads.num_kv_heads * heads.head_dim
        inner = ((self.hidden, 2 * self.intermediate), (self.intermediate, self.hidden))
        expected = ((self.hidden, qkv), (attended, self.hidden), *inner)
        for number, layer in enumerate(layers):
            sizes = tuple((linear.in_features, linear.out_features) for linear in self._linears[number])
            shape = (layer.heads.num_heads, layer.heads.num_kv_heads, layer.heads.head_dim, layer.heads.norm_eps)
            same = shape == (heads.num_heads, heads.num_kv_heads, heads.head_dim, heads.norm_eps)
            norms = (*self._norms[number], self._final_norm)
            if sizes != expected or not same or any(len(norm) != self.hidden for norm in norms):
                raise ValueError(f"layer {number} has linears of {sizes}, expected {expected}, all layers alike")
        if any(table.shape[1] * 2 != heads.head_dim for table in self._angles):
            raise ValueError(f"angles are of {self._angles[0].shape[1] * 2} numbers, heads of {heads.head_dim}")

    def _bind(self, caches: Sequence[LayerCache]) -> None:
        """Remember where the keys and values of each layer are."""
        shape = tuple(caches[0].keys.shape)
        for cache in caches:
            parts = (cache.keys, cache.values)
            if any(t.dtype != torch.bfloat16 or tuple(t.shape) != shape or not t.is_contiguous() for t in parts):
                raise ValueError("a stack's caches are contiguous bfloat16, all of one shape")
        if len(caches) != len(self._layers) or shape[2:] != (self.heads.num_kv_heads, self.heads.head_dim):
            raise ValueError(f"{len(caches)} caches of {shape} for {len(self._layers)} layers")
        for record, cache in zip(self._layers, caches, strict=True):
            record.keys, record.values = cache.keys.data_ptr(), cache.values.data_ptr()
        self._stack.block_size = shape[1]
        self._caches = caches


def _check_tables(inputs: NativeInputs, block_size: int) -> None:
    """Every sequence's table must reach as far as its rows."""
    end = inputs.blocks.ctypes.data + inputs.blocks.nbytes
    stops = [s.blocks for s in inputs.sequences[1:]] + [end]
    for record, stop in zip(inputs.sequences, stops, strict=True):
        held = (stop - record.blocks) // inputs.blocks.itemsize * block_size
        if record.start < 0 or record.num_rows < 1 or record.start + record.num_rows > held:
            raise ValueError(f"{record.num_rows} tokens from {record.start} on do not fit {held} slots")


def _floats(x: torch.Tensor) -> torch.Tensor:
    return x.float().contiguous()
