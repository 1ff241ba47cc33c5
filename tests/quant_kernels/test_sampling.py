"""The sampling kernel against its reference: the kept set to a token, the draw, ties, and rows that are not finite.

What is kept is seen without counting frequencies: the reference's cumulative distribution has a step per kept token,
and the uniform numbers just inside both ends of each step must draw it. One token more or less moves every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
import triton.language as tl

from quant_kernels.sampling import reference
from quant_kernels.sampling import sample as kernel

# numpy in the interpreter; the kernel looks for what comes of it.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")

#: Relative to the total: far beyond float32 rounding, and far below any step that is tested.
INSIDE = 1e-5
VOCAB = 75


@dataclass(frozen=True)
class Settings:
    temperature: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def kept(self, logits: torch.Tensor) -> torch.Tensor:
        return reference.kept_weights(logits, self.temperature, self.min_p, self.top_k, self.top_p)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a few blocks, a copy of a few, and wide bisection, which takes fewer interpreted operations."""
    monkeypatch.setattr(kernel, "BLOCK", 32)
    monkeypatch.setattr(kernel, "CAPACITY", 32)
    monkeypatch.setattr(kernel, "COPY_BLOCK", 16)
    monkeypatch.setattr(kernel, "PIVOTS", 16)


def some_logits(vocab: int = VOCAB, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * scale


def sample(
    logits: torch.Tensor, settings: Sequence[Settings], uniform: Sequence[float], device: torch.device
) -> list[int]:
    columns = [
        torch.tensor([getattr(s, name) for s in settings], dtype=torch.float64, device=device)
        for name in ("temperature", "min_p", "top_k", "top_p")
    ]
    draws = torch.tensor(uniform, dtype=torch.float64, device=device)
    return kernel.sample(logits.to(device), *columns, draws).tolist()


def check_steps(logits: torch.Tensor, settings: Settings, device: torch.device, most: int = 12) -> None:
    """Draw both ends of the steps of the kept tokens, `most` of them spread over the vocabulary."""
    weights = settings.kept(logits)
    ends = weights.cumsum(0) / weights.sum()
    steps = weights / weights.sum()
    wide = (steps > 4 * INSIDE).nonzero().squeeze(1)
    chosen = wide[torch.linspace(0, len(wide) - 1, min(most, len(wide))).long()]
    uniform = torch.cat([ends[chosen] - steps[chosen] + INSIDE, ends[chosen] - INSIDE]).tolist()
    got = sample(logits.expand(len(uniform), -1), [settings] * len(uniform), uniform, device)
    assert got == chosen.tolist() * 2


@pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        Settings(temperature=0.5),
        Settings(top_k=7),
        Settings(top_p=0.8),
        Settings(min_p=0.05),
        Settings(temperature=1.5, top_k=20, top_p=0.7),
        Settings(top_k=60, top_p=0.9, min_p=0.02),
        Settings(top_k=3, min_p=0.9),
        Settings(top_k=VOCAB, top_p=0.5),
    ],
    ids=str,
)
def test_filters_keep_exactly_the_defined_set(settings: Settings, device: torch.device) -> None:
    check_steps(some_logits(), settings, device, most=5)


@pytest.mark.parametrize("settings", [Settings(top_p=0.9), Settings(top_k=50), Settings(min_p=0.45)], ids=str)
def test_more_is_kept_than_the_copy_holds(settings: Settings, device: torch.device) -> None:
    """Flat rows go over the row itself."""
    logits = some_logits(scale=0.3)
    assert int((settings.kept(logits) > 0).sum()) > 32
    check_steps(logits, settings, device, most=4)


@pytest.mark.parametrize("settings", [Settings(top_p=0.4), Settings(top_k=44), Settings(top_k=10, top_p=0.5)], ids=str)
@pytest.mark.parametrize("levels", [1, 4])
def test_ties_go_to_the_lowest_ids(settings: Settings, levels: int, device: torch.device) -> None:
    logits = torch.arange(VOCAB).remainder(levels).float() * 0.5
    # Negative zero equals zero, and has other bits. It comes first in every lane.
    logits[:32] = torch.where(logits[:32] == 0, -0.0, logits[:32])
    check_steps(logits, settings, device, most=3)


def test_greedy_takes_the_lowest_id_of_a_tie(device: torch.device) -> None:
    logits = some_logits().repeat(3, 1)
    logits[0, [70, 33, 40]] = 50.0
    logits[1, [0, 74]] = 50.0
    logits[2, :] = -7.0
    assert sample(logits, [Settings(temperature=0.0, top_k=4, top_p=0.5)] * 3, [0.9] * 3, device) == [33, 0, 0]


def test_extreme_settings(device: torch.device) -> None:
    logits = some_logits()
    best = int(logits.argmax())
    alone = [
        Settings(temperature=1e-5),
        Settings(temperature=1e-5, top_p=0.9),
        Settings(top_k=1),
        Settings(top_p=1e-9),
        Settings(top_p=1e-300),
        Settings(min_p=1.0),
        Settings(temperature=1000.0, top_k=1),
    ]
    for uniform in (0.0, 1.0 - 2.0**-53):
        assert sample(logits.expand(len(alone), -1), alone, [uniform] * len(alone), device) == [best] * len(alone)
    check_steps(logits, Settings(temperature=1000.0), device, most=3)


def test_the_ends_of_the_unit_interval(device: torch.device) -> None:
    """The first and the last token that has weight, however the sums are rounded."""
    logits = some_logits(scale=1.0)
    logits[[0, 1, 72, 73, 74]] = -torch.inf
    for settings in (Settings(), Settings(top_p=0.999), Settings(top_k=68)):
        kept = settings.kept(logits).nonzero().squeeze(1)
        got = sample(logits.expand(2, -1), [settings] * 2, [0.0, 1.0 - 2.0**-53], device)
        assert got == [int(kept[0]), int(kept[-1])]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_not_finite_fail_alone(temperature: float, device: torch.device) -> None:
    logits = some_logits().repeat(7, 1)
    logits[0, 40] = torch.nan
    logits[1, 40] = torch.inf
    logits[2, [3, 40]] = torch.inf
    logits[3, :] = -torch.inf
    logits[4, 0] = torch.nan
    logits[5, 1:] = -torch.inf
    got = sample(logits, [Settings(temperature, top_p=0.9)] * 7, [0.3] * 7, device)
    expected = reference.sample(some_logits(), temperature, 0.0, 0, 0.9, 0.3)
    assert got == [-1, -1, -1, -1, -1, 0, expected]


def test_a_row_does_not_depend_on_its_neighbours(device: torch.device) -> None:
    settings = [Settings(), Settings(0.0), Settings(0.8, top_k=4), Settings(1.3, top_p=0.5), Settings(min_p=0.1)]
    uniform = [0.1, 0.3, 0.5, 0.7, 0.9]
    logits = torch.stack([some_logits(seed=i) for i in range(5)])
    together = sample(logits, settings, uniform, device)
    alone = [sample(logits[i : i + 1], settings[i : i + 1], uniform[i : i + 1], device)[0] for i in range(5)]
    backwards = sample(logits.flip(0), settings[::-1], uniform[::-1], device)[::-1]
    assert together == alone == backwards


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_in_16_bits(dtype: torch.dtype, device: torch.device) -> None:
    """Few values, so many ties; what counts is the float32 of each."""
    logits = some_logits(scale=2.0).to(dtype)
    check_steps(logits, Settings(temperature=0.9, top_k=12, top_p=0.8), device, most=3)
    assert sample(logits.unsqueeze(0), [Settings(0.0)], [0.0], device) == [int(logits.float().argmax())]


@pytest.mark.parametrize("vocab", [2, 5, 32, 129])
def test_odd_sizes_and_the_real_number_of_pivots(
    vocab: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    check_steps(some_logits(vocab), Settings(top_k=30, top_p=0.95), device, most=3)


def test_constants_are_float32() -> None:
    """Triton 3.6 makes a float64 of a constant below the normal float32 numbers, and what it meets becomes one too."""
    constants = [value.value for value in vars(kernel).values() if isinstance(value, tl.constexpr)]
    numbers = [abs(c) for c in constants if isinstance(c, float)]
    assert numbers
    assert all(2.0**-126 <= number < 2.0**128 for number in numbers)


def test_rows_may_lie_apart(device: torch.device) -> None:
    wide = torch.stack([some_logits(100, seed=i) for i in range(2)]).to(device)
    got = sample(wide[:, :VOCAB], [Settings(0.0)] * 2, [0.0] * 2, device)
    assert got == wide[:, :VOCAB].argmax(dim=1).tolist()
