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
        search: how ranges are chosen.
        sequential: a group's inputs are those that the quantized groups before it in the layer make; else those of the
            layer as it was, which takes one pass over the calibration.
        feedback: codes come from GPTQ; else they are the nearest.
        shrinkage: share of each input's own mean square that is added to the Hessian's diagonal. Correlations that a
            few texts show are partly those of their subject; a weaker faith in them is better on others.
        passes: sweeps of coordinate descent over codes and scales.
    """

    calibrated: bool = True
    smooth: bool = False
    weigh: bool = True
    search: Search = Search.INPUTS
    sequential: bool = True
    feedback: bool = False
    shrinkage: float = 0.0
    passes: int = 0


RECIPES = {
    Method.RTN: Recipe(calibrated=False, search=Search.FULL),
    Method.AWQ: Recipe(smooth=True, search=Search.OUTPUTS, sequential=False),
    Method.GPTQ: Recipe(feedback=True, shrinkage=0.5, passes=3),
    Method.AUTO: Recipe(smooth=True, feedback=True, shrinkage=0.5, passes=3),
}
