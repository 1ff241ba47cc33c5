"""GPTQ (Frantar et al., arXiv 2210.17323): codes column by column, each error pushed into the columns still to come.

With U the upper Cholesky factor of the inverse Hessian, the error of column i divided by U[i, i] is taken from column j
times U[i, j]. Columns go in blocks: inside a block at once, to the rest of the matrix when the block is done. Columns
are visited by decreasing diagonal, because the last ones have nowhere to put their error.
Invariant: the grid does not change while codes are chosen (static groups), so the result can be written in any order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from converters.quantizers.grid import Grid

BLOCK = 128
#: Damping grows by this factor while the factorization fails, up to the diagonal's own mean.
DAMPING_GROWTH = 4.0


@dataclass(frozen=True, slots=True)
class Factor:
    """U of a Hessian in visiting order.

    Attributes:
        upper: float32 [K, K].
        order: int64 [K]: the input visited at each step.
        damping: what it took, as a fraction of the mean diagonal.
    """

    upper: torch.Tensor
    order: torch.Tensor
    damping: float


def condition_(hessian: torch.Tensor) -> torch.Tensor:
    """Count dead columns (inputs that were always zero) as one on the diagonal, in place."""
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1.0
    return hessian


def factorize(hessian: torch.Tensor, damping: float) -> Factor | None:
    """U of a conditioned Hessian, with growing damping; None if even the largest does not help.

    Holds two more matrices of the Hessian's size at its peak, and one in what it returns.
    """
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    mean = hessian.diagonal().mean()
    while damping <= 1.0:
        damped = hessian[order.unsqueeze(1), order]
        damped.diagonal().add_(damping * mean)
        upper = _inverse_factor(damped)
        if upper is not None:
            return Factor(upper, order, damping)
        damping *= DAMPING_GROWTH
    return None


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor | None:
    """Upper Cholesky factor of the inverse; destroys its argument."""
    lower = _cholesky(hessian, upper=False)
    if lower is None:
        return None
    inverse = torch.cholesky_inverse(lower, out=hessian)
    # Three matrices of this size are more than two.
    del lower
    return _cholesky(inverse, upper=True)


def _cholesky(matrix: torch.Tensor, upper: bool) -> torch.Tensor | None:
    factor, failed = torch.linalg.cholesky_ex(matrix, upper=upper)
    return None if int(failed) or not bool(torch.isfinite(factor).all()) else factor


def gptq_codes(weight: torch.Tensor, factor: Factor, grid: Grid, group_of: torch.Tensor) -> torch.Tensor:
    """Codes float32 [N, K] for a weight [N, K], both in the layer's order; tables [N, G], group_of int64 [K]."""
    tables = grid.per_weight(group_of[factor.order])
    left = weight[:, factor.order].clone()
    codes = torch.empty_like(left)
    for start in range(0, left.shape[1], BLOCK):
        block = slice(start, min(start + BLOCK, left.shape[1]))
        errors = _block(left[:, block], factor.upper[block, block], tables.slice(block), codes[:, block])
        left[:, block.stop :] -= errors @ factor.upper[block, block.stop :]
    return codes[:, torch.argsort(factor.order)]


def _block(left: torch.Tensor, upper: torch.Tensor, tables: Grid, codes: torch.Tensor) -> torch.Tensor:
    """Choose the codes of one block's columns, in place; returns the scaled errors [N, block]."""
    errors = torch.empty_like(left)
    columns = left.t().contiguous()
    for step in range(left.shape[1]):
        column = columns[step]
        table = tables.column(step)
        code = table.codes(column)
        codes[:, step] = code
        error = (column - table.values(code)) / upper[step, step]
        errors[:, step] = error
        columns[step + 1 :] -= upper[step, step + 1 :].unsqueeze(1) * error
    return errors
