"""The errors a user can meet. Each message says what was found, what was expected and what to do.

Invariant: everything qengine raises on purpose derives from `QEngineError`; asserts are for our own bugs.
This module does not format tracebacks or choose exit codes: cli and serving do.
"""

from __future__ import annotations


class QEngineError(Exception):
    """Base of every error that qengine raises on purpose."""


class ConfigError(QEngineError, ValueError):
    """An option is unknown, malformed, or contradicts another one or the model."""


class DoesNotFitError(ConfigError):
    """A model, as it was asked for, needs more memory than there is.

    Attributes:
        summary: what is missing, in one line.
        table: where the memory would go, and what would help; several lines.
    """

    def __init__(self, summary: str, table: str) -> None:
        super().__init__(f"{summary}\n{table}")
        self.summary = summary
        self.table = table


class LoadError(QEngineError):
    """A model cannot be loaded: not found, broken, unsupported, or too large for the memory given."""


class RequestError(QEngineError, ValueError):
    """One request is refused; the engine and every other request are unaffected.

    Attributes:
        param: name of the offending field, or None.
        code: machine-readable reason such as "context_length_exceeded", or None.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class GrammarError(QEngineError):
    """A grammar cannot say which tokens may come next; the request that it belongs to fails, and no other."""


class EngineDeadError(QEngineError):
    """The engine stopped after an internal failure and answers no more requests."""


class StepMemoryError(QEngineError):
    """There was no memory for a step. Nothing of it counts; a smaller one may be run."""


class TransportError(QEngineError):
    """Ranks cannot hand each other tensors any more: one is stalled, has ended, or has made another call.

    Attributes:
        rank: the rank that is to blame as far as this one can tell, or None; by its place in the transport, while the
            text has its number among all ranks of the model.
    """

    def __init__(self, message: str, *, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank
