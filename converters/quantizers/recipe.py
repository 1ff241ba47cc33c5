"""What each method does, as steps that all methods share, so that what helps one is there for all."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from converters.quantizers.base import Method


class Search(Enum):
    """How the range of a group is chosen: all of it, by the importance of inputs, by the group's output error."""

    FULL = 0
    INPUTS = 1
    OUTPUTS = 2


@dataclass(frozen=True, slots=True)
class Recipe:
    """The steps of a method, in order.

    Attributes:
        calibrated: it reads inputs at all.
        smooth: AWQ's factors are searched and folded.
        weigh: positions count by the size of the hidden state that an output is added to; see `hessian`.
        correction: share of the difference between original and quantized inputs that the target makes up for.
        search: how ranges are chosen.
        feedback: codes come from GPTQ; else they are the nearest.
        passes: sweeps of coordinate descent over codes and scales.
    """

    calibrated: bool = True
    smooth: bool = False
    weigh: bool = True
    correction: float = 0.0
    search: Search = Search.INPUTS
    feedback: bool = False
    passes: int = 0


RECIPES = {
    Method.RTN: Recipe(calibrated=False, search=Search.FULL),
    Method.AWQ: Recipe(smooth=True, search=Search.OUTPUTS),
    Method.GPTQ: Recipe(feedback=True),
    Method.AUTO: Recipe(correction=0.5, feedback=True, passes=3),
}
