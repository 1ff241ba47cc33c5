"""qengine: big open language models, 4-bit, on the cards people own.

    from qengine import LLM, SamplingParams

Heavy modules load when a name is first used, so that the command line answers at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qengine.imports import import_late

if TYPE_CHECKING:
    from qengine.evaluation import evaluate
    from qengine.llm import LLM
    from qengine.request import CompletionOutput, Logprob, RequestOutput, SamplingParams, StructuredOutputs

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "CompletionOutput",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputs",
    "__version__",
    "evaluate",
]

_HOMES = {
    "LLM": "qengine.llm",
    "evaluate": "qengine.evaluation",
    "CompletionOutput": "qengine.request",
    "Logprob": "qengine.request",
    "RequestOutput": "qengine.request",
    "SamplingParams": "qengine.request",
    "StructuredOutputs": "qengine.request",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'qengine' has no attribute '{name}'")
    return getattr(import_late(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
