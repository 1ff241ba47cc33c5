"""Executors: who runs a step. One process on one device for now; ranks in other processes join behind this interface.

Invariant: `step` returns an answer for every sampling entry of the batch, or raises and the engine is dead.
"""

from __future__ import annotations

from typing import Protocol

from qengine.errors import EngineDeadError
from qengine.runtime.runner import ModelRunner
from qengine.scheduling.batch import Batch, StepResult


class Executor(Protocol):
    """Runs batches on all ranks."""

    def step(self, batch: Batch) -> StepResult:
        """Run one batch and wait for its tokens."""
        ...

    def shutdown(self) -> None:
        """Release devices and processes. Idempotent."""
        ...


class UniprocExecutor:
    """The model in this process."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner: ModelRunner | None = runner

    @property
    def runner(self) -> ModelRunner:
        """The runner.

        Raises:
            EngineDeadError: after shutdown.
        """
        if self._runner is None:
            raise EngineDeadError("the model has been released; start a new engine")
        return self._runner

    def step(self, batch: Batch) -> StepResult:
        return self.runner.step(batch)

    def shutdown(self) -> None:
        """Let go of the model and the cache, so that their memory is free."""
        self._runner = None
