"""Executors: who runs a step. One process on one device here; ranks in other processes are `SpawnExecutor`'s.

Invariant: each step that was begun and finished has an answer for every sampling entry of its batch, or `finish` raises
and the engine is dead. An executor neither schedules nor knows requests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from qengine.runtime.runner import ModelRunner
from qengine.runtime.worker import Worker
from qengine.scheduling.batch import Batch, StepResult

#: Told once why the ranks have failed, from any thread.
OnFailure = Callable[[str], None]


class StepInFlight(Protocol):
    """A step that was begun."""

    def finish(self) -> StepResult:
        """Wait for its answers. After an interrupt it may be called again."""
        ...


class Executor(Protocol):
    """Runs batches on all ranks. Steps are finished in the order they were begun."""

    @property
    def max_in_flight(self) -> int:
        """Steps that may be begun before the first is finished; that many keep every device busy."""
        ...

    def begin(self, batch: Batch) -> StepInFlight:
        """Hand a step to the ranks."""
        ...

    def check(self, timeout: float) -> None:
        """With no step in flight: raise unless every rank answers within `timeout` seconds."""
        ...

    def on_failure(self, callback: OnFailure) -> None:
        """Have `callback` told when ranks fail, even when no step runs; at once if they have failed already."""
        ...

    def shutdown(self, grace: float = 5.0) -> None:
        """Release devices and processes; what has not ended by itself after `grace` seconds is killed. Idempotent."""
        ...


class UniprocExecutor:
    """The model in this process."""

    max_in_flight = 1

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    @property
    def runner(self) -> ModelRunner:
        """The runner. Raises EngineDeadError after shutdown."""
        return self._worker.runner

    def begin(self, batch: Batch) -> StepInFlight:
        return self._worker.begin(batch)

    def check(self, timeout: float) -> None:
        self._worker.check()

    def on_failure(self, callback: OnFailure) -> None:
        """A failure in this process is an exception out of a step; there is nothing else to tell."""

    def shutdown(self, grace: float = 5.0) -> None:
        self._worker.shutdown()
