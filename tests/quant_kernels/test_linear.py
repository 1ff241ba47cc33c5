"""Every prepared linear against the reference, and the dispatch's reasons.

Tolerance in bfloat16: scales, zeros and x are rounded to 8 bits (relative 2^-9 each) and the result once more; the
errors of K products add like a random walk, so a few 2^-8 of the result's own size bounds them.
"""

from __future__ import annotations

import pytest
import torch

from quant_kernels.linear import cpu_int4
from quant_kernels.linear.cpu_int4 import CpuInt4Linear, can_run
from quant_kernels.linear.dense import DenseLinear
from quant_kernels.linear.dispatch import Target, choose, prepare
from quant_kernels.packed_weight import DenseWeight
from quant_kernels.reference import dequantize, linear
from tests.quant_kernels.records import KINDS, random_record

CPU = torch.device("cpu")


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("in_features", "out_features", "group_size"),
    [
        (64, 16, 32),
        (128, 24, 64),
        (256, 33, 128),
        (256, 48, 256),
        (96, 16, 96),
        (704, 16, 64),
        (512, 16, 512),
        (192, 16, 192),
    ],
)
@pytest.mark.parametrize("bits", [4, 8])
def test_int4_kernel_matches_the_reference(
    kind: str, in_features: int, out_features: int, group_size: int, bits: int
) -> None:
    record = random_record(in_features, out_features, group_size, kind=kind, bits=bits, bias=True)
    prepared = prepare(record, Target(CPU, torch.bfloat16))
    assert isinstance(prepared, CpuInt4Linear)
    for rows in (1, 5, 17):
        x = torch.randn(rows, in_features, generator=torch.Generator().manual_seed(rows)).bfloat16()
        got = prepared(x)
        assert got.shape == (rows, out_features)
        assert relative_error(got, linear(x, record)) < 2**-7


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_in_slices_equals_packing_at_once(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    record = random_record(64, 64 * 3 + 40, 32, bits=bits)
    whole = CpuInt4Linear(record)
    monkeypatch.setattr(cpu_int4, "_SLICE_COLUMNS", 64)
    sliced = CpuInt4Linear(record)
    assert torch.equal(whole.codes, sliced.codes)


def test_activation_order_is_undone() -> None:
    record = random_record(128, 32, 32, act_order=True)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    dense = x @ dequantize(record)
    assert relative_error(CpuInt4Linear(record)(x.bfloat16()), dense) < 2**-7
    assert relative_error(DenseLinear(record, torch.float32, CPU)(x), dense) < 1e-6


@pytest.mark.parametrize("kind", [*KINDS, "codebook"])
def test_float32_is_exact(kind: str) -> None:
    record = random_record(72, 10, 24, kind=kind, bias=True)
    x = torch.randn(4, 72, generator=torch.Generator().manual_seed(0))
    prepared = prepare(record, Target(CPU, torch.float32))
    assert prepared.kernel == "dense"
    assert torch.allclose(prepared(x), linear(x, record), rtol=1e-6, atol=1e-6)


def test_what_the_kernel_cannot_run_goes_dense_with_the_reason() -> None:
    for record, word in [
        (random_record(64, 16, 16), "group size 16"),
        (random_record(72, 16, 72), "group size 72"),
        (random_record(64, 16, 32, kind="codebook"), "non-uniform"),
    ]:
        assert not can_run(record, torch.bfloat16)[0]
        kernel, reason = choose(record, Target(CPU, torch.bfloat16))
        assert kernel == "dense"
        assert word in reason
        x = torch.randn(2, record.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
        assert relative_error(prepare(record, Target(CPU, torch.bfloat16))(x), linear(x, record)) < 2**-7
    assert "bfloat16 only" in choose(random_record(64, 16, 32), Target(CPU, torch.float16))[1]


def test_dense_weight() -> None:
    weight = DenseWeight(torch.randn(6, 5), torch.randn(6))
    x = torch.randn(2, 5)
    assert torch.allclose(prepare(weight, Target(CPU, torch.float32))(x), x @ weight.weight.t() + weight.bias)
    assert choose(weight, Target(CPU, torch.float32)) == ("dense", "the weight is not quantized")


def test_memory_is_counted() -> None:
    record = random_record(128, 32, 32, kind="const")
    # 4 bits a weight, and a bfloat16 scale and zero for each group and column.
    assert CpuInt4Linear(record).num_bytes == 128 * 32 // 2 + 4 * 32 * 4
    assert DenseLinear(record, torch.bfloat16, CPU).num_bytes == 128 * 32 * 2
