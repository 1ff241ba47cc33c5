"""Ctrl-C and SIGTERM for a main thread that first works and then waits.

Invariant: while loading, the first signal ends the load at once by an exception; any other is only noted, and `wait`
returns. Waiting uses a pair of sockets: a lock could be held by the very code that a signal interrupts. Outside the
main thread (tests, embedding) no signal is caught and only `wake` ends a wait.
"""

from __future__ import annotations

import select
import signal
import socket
import threading
from contextlib import suppress
from types import FrameType, TracebackType

_CAUGHT = (signal.SIGINT, signal.SIGTERM)


class InterruptedLoadError(KeyboardInterrupt):
    """A signal came while the model was loading. No Exception: nothing on the way may take it for a failure."""


class StopSignals:
    """Catches signals as long as its context is open.

    Attributes:
        received: the signals so far, in order.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._interrupts = False
        self._previous: dict[int, object] = {}
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in _CAUGHT:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal itself returned
        self._reader.close()
        self._writer.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
        self.wake()
        if self._interrupts:
            self._interrupts = False
            raise InterruptedLoadError

    def set_interrupting(self, interrupts: bool) -> None:
        """Whether the next signal raises InterruptedLoadError in the main thread."""
        self._interrupts = interrupts and not self.received
        if interrupts and self.received:
            raise InterruptedLoadError

    def wake(self) -> None:
        """End a `wait`, from any thread."""
        with suppress(OSError):  # Full: it will wake anyway. Closed: nobody waits.
            self._writer.send(b"x")

    def wait(self, seconds: float | None = None) -> None:
        """Return at the next signal or `wake`, at once if one came since the last call, or when time is over."""
        select.select([self._reader], [], [], seconds)
        with suppress(BlockingIOError):
            self._reader.recv(4096)
