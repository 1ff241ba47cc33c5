"""What ranks hand each other in tests, and what must come of it, computed without any transport."""

from __future__ import annotations

from collections.abc import Sequence

import torch

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
DTYPES = (*FLOATS, torch.int32, torch.int64, torch.uint8)


def inputs_of(size: int, shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    """A tensor for each rank; every rank can make those of the others."""
    draw = torch.Generator().manual_seed(seed)
    if dtype in FLOATS:
        return [torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype) for _ in range(size)]
    return [torch.randint(0, 50, tuple(shape), generator=draw).to(dtype) for _ in range(size)]


def check_sum(found: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
    """Hold a sum against one in 64 bits: integers exactly, floats to their rounding of the parts' magnitudes."""
    wide = torch.float64 if parts[0].dtype in FLOATS else torch.int64
    expected = sum(part.to(wide) for part in parts)
    assert isinstance(expected, torch.Tensor)
    assert found.dtype == parts[0].dtype
    if wide is torch.int64:
        assert torch.equal(found.to(wide), expected)
        return
    magnitude = sum(part.to(wide).abs() for part in parts)
    # 16-bit parts are added in 32 bits and rounded once; wider ones are rounded at every addition.
    assert ((found.to(wide) - expected).abs() <= len(parts) * magnitude * torch.finfo(found.dtype).eps / 2).all()
