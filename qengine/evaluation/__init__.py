"""How good a model is, and how far it is from the one it was made of: `evaluate` and its result.

texts -> windows -> hidden states -> logits, a few rows at a time -> figures. What is measured is the engine's own
forward, on whatever the engine loads. Invariant: two models are compared on the same tokens in the same windows.
"""

from qengine.evaluation.figures import Comparison, Evaluation, ModelFigures, Protocol
from qengine.evaluation.measure import evaluate

__all__ = ["Comparison", "Evaluation", "ModelFigures", "Protocol", "evaluate"]
