"""How much may be in the server at once, of sequences and of what comes before them, and who is turned away.

Invariant: what is counted as in flight is the sum over what is open, and exceeds the capacity by nothing but what need
not fit. One thread uses it (the event loop's); only `begin_drain` may come from another. It knows neither HTTP nor the
engine.
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


class Allowance:
    """So much of something for all requests together.

    Args:
        capacity: how much.
        what: its name, for errors.
    """

    def __init__(self, capacity: int, what: str) -> None:
        self.capacity = capacity
        self.num_in_flight = 0
        self._what = what

    @contextmanager
    def reserve(self) -> Iterator[Share]:
        """A share that is empty at first, and given back when the context is closed."""
        share = Share(self)
        try:
            yield share
        finally:
            self.num_in_flight -= share.size

    def check(self, num_more: int) -> None:
        """Raise QueueFullError if so much more is not to be had now."""
        if self.num_in_flight + num_more > self.capacity:
            raise QueueFullError(
                f"the server is full: {self.num_in_flight} of {self.capacity} {self._what} are under way; "
                "try again later"
            )


class Share:
    """What one request has of an allowance."""

    def __init__(self, allowance: Allowance) -> None:
        self._allowance = allowance
        self.size = 0

    def grow(self, num_more: int, *, must_fit: bool = True) -> None:
        """Take more. Raises QueueFullError if there is not so much left, unless it need not fit."""
        if must_fit:
            self._allowance.check(num_more)
        self.size += num_more
        self._allowance.num_in_flight += num_more


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
