"""WeightSource: what a model asks a checkpoint for, whatever its format.

A model lists its `Slot`s (exact tensor names and sizes). `check` compares them with the file's headers alone and
reports every missing, leftover and mis-shaped tensor together; only then are weights read, one slot at a time.
`linear_kind` says which linears are stored alike, so that one can be read for all of them.
A `HeaderSource` answers from headers alone and needs no torch; a `WeightSource` reads too.
Invariant: `check` reads no tensor data (but small biases that may be left over), and `read_*` succeed on every checked
slot unless the data itself is bad. It does not place weights on a device and does not fuse or shard them.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from quant_kernels.footprint import WeightFacts

if TYPE_CHECKING:
    import torch

    from converters.read_ahead import ByteRange, Reader
    from quant_kernels.packed_weight import DenseWeight, PackedWeight


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """A plain tensor a model needs: exact name (with its ``.weight``) and shape."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LinearSlot:
    """A linear a model needs: module name (no suffix), K and N, and whether the architecture gives it a bias.

    Quantized-ness is not the model's business: the source decides by the tensors it finds. A bias in the file that
    the architecture does not have is dropped if all zero, else kept (files of AutoGPTQ carry both).
    """

    name: str
    in_features: int
    out_features: int
    has_bias: bool = False


@dataclass(frozen=True, slots=True)
class LinearKind:
    """How a linear is stored, as far as headers and configs tell: linears of one kind are read alike.

    Attributes:
        tensors: role in the module, dtype as the file calls it, and shape, of each of its tensors.
        is_dense: it is not quantized.
        declared: what the file's config says of it beyond that; only compared, never looked into.
    """

    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]
    is_dense: bool
    declared: Hashable = None


Slot = TensorSlot | LinearSlot
Weight: TypeAlias = "PackedWeight | DenseWeight"


class HeaderSource(Protocol):
    """An opened checkpoint whose headers are known.

    Attributes:
        path: the folder or file.
        config: the keys of ``config.json`` as transformers names them (made from the metadata for GGUF).
        quantization: "gptq", "awq", "compressed-tensors", "gguf" or None for a plain checkpoint.
        description: one human-readable line, e.g. "GPTQ 4-bit, group 128, symmetric, act-order".
    """

    path: str
    config: Mapping[str, Any]
    quantization: str | None
    description: str

    def has_linear(self, name: str) -> bool:
        """Whether module `name` has weights of its own, dense or quantized (for ``lm_head``: else it is tied)."""
        ...

    def check(self, slots: Sequence[Slot]) -> None:
        """Raise one CheckpointError listing every missing, leftover, mis-shaped or unsupported tensor."""
        ...

    def linear_kind(self, slot: LinearSlot) -> LinearKind:
        """How a checked slot is stored. Reads no tensor data."""
        ...

    def linear_facts(self, slot: LinearSlot) -> WeightFacts:
        """What the record of a checked slot will be. Reads no tensor data, and believes the headers where it must."""
        ...


class WeightSource(HeaderSource, Protocol):
    """An opened checkpoint whose tensors can be read."""

    def ranges(self, slot: Slot) -> Sequence[ByteRange]:
        """Where the data of a checked slot lie, in the order of their file; empty where nothing is read."""
        ...

    def read_through(self, reader: Reader) -> WeightSource:
        """The same source, whose bytes come from `reader`."""
        ...

    def read_tensor(self, slot: TensorSlot) -> torch.Tensor:
        """The tensor, on the CPU, in the file's float dtype (dequantized to float32 where the file packs it)."""
        ...

    def read_linear(self, slot: LinearSlot) -> Weight:
        """The linear as a PackedWeight (4 and 8 bits), or a DenseWeight for everything else."""
        ...
