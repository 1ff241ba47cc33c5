"""How many sequences may be in the server at once, and who is turned away.

Invariant: `num_in_flight` is the sum over open reservations and never exceeds `capacity`. One thread uses it (the event
loop's); only `begin_drain` may come from another. It knows neither HTTP nor the engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qengine.errors import EngineDeadError, QEngineError, RequestError


class QueueFullError(QEngineError):
    """As many sequences are running and waiting as the server holds; try again later."""


class QueueTimeoutError(QEngineError):
    """A request waited in the queue for longer than --queue-timeout; try again later."""


class RequestTimeoutError(QEngineError):
    """A request took longer than --request-timeout and was stopped."""


class NotAcceptingError(QEngineError):
    """The server finishes what it has and takes nothing new."""


class ShutDownError(EngineDeadError):
    """The server was stopped before the request was finished: by a second signal, or after --drain-timeout."""


class Admission:
    """Counts sequences (prompts times choices), running and waiting together."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.num_in_flight = 0
        self.is_draining = False

    def begin_drain(self) -> None:
        """Refuse new requests from now on; what is in flight goes on."""
        self.is_draining = True

    @contextmanager
    def reserve(self, num_sequences: int) -> Iterator[None]:
        """Count `num_sequences` as in flight for as long as the context is open.

        Raises:
            RequestError: more than the server ever holds. QueueFullError: more than it can take now.
            NotAcceptingError: it is draining.
        """
        if self.is_draining:
            raise NotAcceptingError("the server is shutting down and takes no new requests")
        if num_sequences > self.capacity:
            raise RequestError(
                f"the request asks for {num_sequences} sequences, but this server holds at most {self.capacity}; "
                "send fewer prompts or a smaller n",
                param="n",
            )
        if self.num_in_flight + num_sequences > self.capacity:
            raise QueueFullError(
                f"the server is full: {self.num_in_flight} of {self.capacity} sequences are running or waiting; "
                "try again later"
            )
        self.num_in_flight += num_sequences
        try:
            yield
        finally:
            self.num_in_flight -= num_sequences
