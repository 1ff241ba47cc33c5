"""Who multiplies: qengine's kernels, torch's dense and int4 matmuls, and GemLite and Marlin where a copy is given.

A contender gets a weight once and returns one call per copy of it. Peers are used through their public interface
alone, get weights of the same size and format (their values do not matter for time), and name the reason when they
cannot take part.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from benchmarks.gpu.problems import Shape, Workload, num_copies
from quant_kernels.linear.p16.layout import P16Weight
from quant_kernels.linear.p16.prepared import P16Linear
from quant_kernels.packed_weight import PackedWeight
from quant_kernels.tuning.select import Selector

Call = Callable[[], torch.Tensor]
CUDA = torch.device("cuda")
_GEMLITE_ROWS = 16
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Case:
    """One weight of a workload on the device, and how often to copy it."""

    shape: Shape
    workload: Workload
    record: PackedWeight
    l2_bytes: int

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.workload.dtype]

    def copies(self, bits_per_weight: float) -> int:
        """Copies of a weight of so many bits each."""
        return num_copies(int(self.shape.num_weights * bits_per_weight / 8), self.l2_bytes)


class Contender(Protocol):
    """Someone who can multiply."""

    name: str

    def unavailable(self, case: Case, rows: int) -> str | None:
        """Why it cannot take part, or None."""
        ...

    def calls(self, case: Case, x: torch.Tensor) -> list[Call]:
        """One call per copy of the weight."""
        ...


def random_weight(shape: Shape, workload: Workload, seed: int = 0) -> PackedWeight:
    """A 4-bit weight with random codes, on the device."""
    rng = torch.Generator(device=CUDA).manual_seed(seed)
    groups = -(-shape.in_features // workload.group_size)
    table = (groups, shape.out_features)
    words = (shape.in_features // 8, shape.out_features)
    codes = torch.randint(-(2**31), 2**31 - 1, words, generator=rng, device=CUDA, dtype=torch.int64)
    scales = (torch.rand(table, generator=rng, device=CUDA) + 0.5) * shape.in_features**-0.5 / 8
    is_const = workload.zero == "const"
    zeros = torch.randint(1, 16, table, generator=rng, device=CUDA, dtype=torch.int64).to(torch.uint8)
    return PackedWeight(
        bits=4,
        codes=codes.to(torch.int32),
        scales=scales.to(DTYPES[workload.dtype]),
        group_size=workload.group_size,
        in_features=shape.in_features,
        out_features=shape.out_features,
        zero_const=8 if is_const else None,
        zeros=None if is_const else zeros,
    )


def copies_of(weight: P16Weight, count: int) -> list[P16Weight]:
    """The weight and count - 1 copies with tensors of their own."""

    def clone() -> P16Weight:
        offsets = None if weight.offsets is None else weight.offsets.clone()
        return replace(weight, words=weight.words.clone(), scales=weight.scales.clone(), offsets=offsets)

    return [weight, *(clone() for _ in range(count - 1))]


class Own:
    """qengine: what `tuning` selects. Partial sums are left to the next kernel, as in a model."""

    name = "qengine"

    def __init__(self, selector: Selector) -> None:
        self._selector = selector

    def unavailable(self, case: Case, rows: int) -> str | None:
        return None

    def linears(self, case: Case) -> list[P16Linear]:
        """One linear per copy of the weight."""
        first = P16Linear.of(case.record, case.dtype, CUDA, self._selector).weight
        count = case.copies(8 * first.bytes_per_pass / case.shape.num_weights)
        return [P16Linear(weight, self._selector) for weight in copies_of(first, count)]

    def calls(self, case: Case, x: torch.Tensor) -> list[Call]:
        return [lambda linear=linear: linear.partial_sums(x) for linear in self.linears(case)]  # type: ignore[misc]


class Summed(Own):
    """qengine with the partial sums added up by a kernel of its own: for callers whose next kernel does not."""

    name = "qengine, summed"

    def calls(self, case: Case, x: torch.Tensor) -> list[Call]:
        return [lambda linear=linear: linear(x) for linear in self.linears(case)]  # type: ignore[misc]


class Dense:
    """cuBLAS on the weight in 16 bits, through torch."""

    name = "cuBLAS"

    def unavailable(self, case: Case, rows: int) -> str | None:
        return None

    def calls(self, case: Case, x: torch.Tensor) -> list[Call]:
        shape = (case.shape.out_features, case.shape.in_features)
        weights = [torch.randn(shape, dtype=case.dtype, device=CUDA) for _ in range(case.copies(16))]
        return [lambda w=w: torch.nn.functional.linear(x, w) for w in weights]  # type: ignore[misc]


class TorchInt4:
    """torch's own int4 matmul (tinygemm); bfloat16 alone."""

    name = "torch int4"

    def unavailable(self, case: Case, rows: int) -> str | None:
        if case.workload.dtype != "bfloat16":
            return "bfloat16 only"
        if case.workload.group_size not in (32, 64, 128, 256):
            return "groups of 32 to 256 only"
        return None

    def calls(self, case: Case, x: torch.Tensor) -> list[Call]:
        shape, group = case.shape, case.workload.group_size
        half = torch.randint(0, 256, (shape.out_features, shape.in_features // 2), dtype=torch.uint8, device=CUDA)
        packed = torch.ops.aten._convert_weight_to_int4pack(half, 8)
        tables = (shape.in_features // group, shape.out_features, 2)
        scales = torch.rand(tables, dtype=torch.bfloat16, device=CUDA)
        pairs = [(packed.clone(), scales.clone()) for _ in range(case.copies(4 + 32 / group))]
        multiply = torch.ops.aten._weight_int4pack_mm
        return [lambda w=w, s=s: multiply(x, w, group, s) for w, s in pairs]  # type: ignore[misc]


class GemLite:
    """GemLite's Triton kernels, from an unpacked copy of its sources.

    It tunes itself for every shape and number of rows, a minute each, so it takes part only where it is aimed at.
    """

    name = "GemLite"

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def unavailable(self, case: Case, rows: int) -> str | None:
        if self._folder is None:
            return "no copy given (--gemlite)"
        if rows > _GEMLITE_ROWS:
            return f"measured up to M {_GEMLITE_ROWS}"
        return _import_problem("gemlite", self._folder)

    def calls(self, case: Case, x: torch.Tensor) -> list[Call]:
        gemlite = importlib.import_module("gemlite")
        shape, group = case.shape, case.workload.group_size
        kind = gemlite.DType.FP16 if case.workload.dtype == "float16" else gemlite.DType.BF16
        codes = torch.randint(0, 16, (shape.out_features, shape.in_features), device=CUDA).to(torch.uint8)
        tables = (codes.numel() // group, 1)
        scales = torch.rand(tables, dtype=case.dtype, device=CUDA)
        zeros = 8 if case.workload.zero == "const" else torch.full(tables, 8.0, dtype=case.dtype, device=CUDA)
        calls: list[Call] = []
        for _ in range(case.copies(4 + 32 / group)):
            linear = gemlite.GemLiteLinear(
                4,
                group_size=group,
                in_features=shape.in_features,
                out_features=shape.out_features,
                input_dtype=kind,
                output_dtype=kind,
            )
            linear.pack(codes, scales, zeros, None)
            calls.append(lambda linear=linear: linear(x))  # type: ignore[misc]
        return calls


class Marlin:
    """Marlin's CUDA kernel, from a folder in which its extension has been built. float16, constant zero point."""

    name = "Marlin"

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def unavailable(self, case: Case, rows: int) -> str | None:
        if self._folder is None:
            return "no built copy given (--marlin)"
        if case.workload.dtype != "float16" or case.workload.group_size != 128 or case.workload.zero != "const":
            return "float16 with groups of 128 and a constant zero point only"
        return _import_problem("marlin", self._folder)

    def calls(self, case: Case, x: torch.Tensor) -> list[Call]:
        marlin = importlib.import_module("marlin")
        shape, rows = case.shape, x.shape[0]
        words = torch.randint(-(2**31), 2**31 - 1, (shape.in_features // 16, shape.out_features * 2), device=CUDA)
        scales = torch.rand(shape.in_features // 128, shape.out_features, dtype=torch.float16, device=CUDA)
        workspace = torch.zeros(shape.out_features // 128 * 16, dtype=torch.int32, device=CUDA)
        out = torch.empty(rows, shape.out_features, dtype=torch.float16, device=CUDA)
        pairs = [(words.to(torch.int32), scales.clone()) for _ in range(case.copies(4 + 16 / 128))]

        def multiply(w: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
            marlin.mul(x, w, out, s, workspace)
            return out

        return [lambda w=w, s=s: multiply(w, s) for w, s in pairs]  # type: ignore[misc]


def contenders(selector: Selector, gemlite: Path | None, marlin: Path | None) -> Sequence[Contender]:
    """Ours first; every other is a peer."""
    return (Own(selector), Summed(selector), Dense(), TorchInt4(), GemLite(gemlite), Marlin(marlin))


def _import_problem(module: str, folder: Path) -> str | None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"cannot be imported from {folder.name}: {error}"
    return None
