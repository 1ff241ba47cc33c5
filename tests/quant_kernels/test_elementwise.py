"""The elementwise kernels against their references: partial sums in, permuted rows out, the residual in place."""

from __future__ import annotations

import pytest
import torch

from quant_kernels.elementwise import reference
from quant_kernels.elementwise.rms_norm import add_rms_norm
from quant_kernels.elementwise.silu_mul import silu_mul
from quant_kernels.tolerance import UNIT_ROUNDOFF, Error, error

DTYPES = (torch.float16, torch.bfloat16)


def rounding(dtype: torch.dtype) -> Error:
    """One rounding of the result, and float32 arithmetic before it."""
    return Error(UNIT_ROUNDOFF[dtype] + 1e-5, UNIT_ROUNDOFF[dtype] / 2 + 1e-5)


def order(size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A permutation and, for the kernel, the place of each column in it."""
    perm = torch.randperm(size, generator=torch.Generator().manual_seed(1))
    return perm, torch.argsort(perm).to(device, torch.int32)


def random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (5, 100), (2, 576)])
@pytest.mark.parametrize("permuted", [False, True])
def test_add_rms_norm(
    dtype: torch.dtype, splits: int, rows: int, columns: int, permuted: bool, device: torch.device
) -> None:
    x = random(splits, rows, columns, dtype=dtype if splits == 1 else torch.float32, device=device)
    residual = random(rows, columns, dtype=dtype, device=device, seed=1)
    weight = random(columns, dtype=dtype, device=device, seed=2)
    perm, places = order(columns, device) if permuted else (None, None)
    expected, total = reference.add_rms_norm(x.cpu(), residual.cpu(), weight.cpu(), 1e-5, perm)
    got = add_rms_norm(x, residual, weight, 1e-5, places)
    assert got.dtype == dtype
    assert error(got.cpu(), expected).within(rounding(dtype))
    assert error(residual.cpu(), total).within(rounding(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize(("rows", "columns"), [(1, 96), (3, 1100)])
@pytest.mark.parametrize("permuted", [False, True])
def test_silu_mul(
    dtype: torch.dtype, splits: int, rows: int, columns: int, permuted: bool, device: torch.device
) -> None:
    x = random(splits, rows, 2 * columns, dtype=dtype if splits == 1 else torch.float32, device=device)
    perm, places = order(columns, device) if permuted else (None, None)
    got = silu_mul(x, dtype, places)
    assert got.dtype == dtype
    assert error(got.cpu(), reference.silu_mul(x.cpu(), perm)).within(rounding(dtype))


def test_a_row_longer_than_the_registers(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quant_kernels.elementwise.rms_norm.MAX_BLOCK", 64)
    x = random(4, 3, 200, dtype=torch.float32, device=device)
    residual = random(3, 200, dtype=torch.float16, device=device, seed=1)
    weight = random(200, dtype=torch.float16, device=device, seed=2)
    perm, places = order(200, device)
    expected, total = reference.add_rms_norm(x.cpu(), residual.cpu(), weight.cpu(), 1e-5, perm)
    got = add_rms_norm(x, residual, weight, 1e-5, places)
    # The sum is read back rounded: one rounding more.
    allowed = rounding(torch.float16)
    assert error(got.cpu(), expected).within(Error(2 * allowed.worst, 2 * allowed.mean))
    assert error(residual.cpu(), total).within(allowed)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy in the interpreter; infinity is right there.
def test_extreme_gates_stay_finite(device: torch.device) -> None:
    x = torch.tensor([[[-1e4, 1e4, -100.0, 100.0, 1.0, 1.0, 2.0, 2.0]]], device=device)
    got = silu_mul(x, torch.float32)
    assert torch.equal(got.cpu(), torch.tensor([[0.0, 1e4, -0.0, 200.0]]))
