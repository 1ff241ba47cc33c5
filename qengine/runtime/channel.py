"""Channel: whole messages of bytes over a socket between two processes of one machine.

A frame is a length in four bytes, little-endian, and so many bytes. Invariant: what arrives is what was sent, whole and
in order, or an error; a length is only believed as far as bytes arrive, so that a broken one costs no memory, and one
above `MAX_FRAME_BYTES` is an error at once. It does not know what the bytes mean.
"""

from __future__ import annotations

import select
import socket
import struct
import time

from qengine.errors import QEngineError

MAX_FRAME_BYTES = 2**28
_HEADER = struct.Struct("<I")
_CHUNK_BYTES = 2**18


class ProtocolError(QEngineError):
    """Bytes from another process that are not what the protocol allows."""


class ChannelClosedError(QEngineError):
    """The process at the other end has closed the channel, or is gone."""


def frame(payload: bytes) -> memoryview:
    """A message as it goes over the socket.

    Raises:
        ProtocolError: it is too large.
    """
    if len(payload) > MAX_FRAME_BYTES:
        raise ProtocolError(f"a message has {len(payload)} bytes, at most {MAX_FRAME_BYTES} can be sent")
    return memoryview(_HEADER.pack(len(payload)) + payload)


class Channel:
    """One end of a stream socket; used by one thread at a time."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._socket = end
        self._received = bytearray()

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()

    def send(self, payload: bytes, timeout: float | None = None) -> None:
        """Send one message, waiting as long as the other end takes nothing more.

        Raises:
            ProtocolError: it is too large. ChannelClosedError: nobody is there. TimeoutError: it was not taken in time.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        left = frame(payload)
        while left := self.try_send(left):
            self._wait(select.POLLOUT, deadline)

    def try_send(self, left: memoryview) -> memoryview:
        """Send as much of a `frame`, or of what is left of one, as is taken now. Returns what is left then.

        Raises:
            ChannelClosedError: nobody is there.
        """
        try:
            while left:
                left = left[self._socket.send(left) :]
        except BlockingIOError:
            pass
        except OSError as error:
            raise ChannelClosedError(f"nobody reads the channel: {error.strerror}") from error
        return left

    def receive(self, timeout: float | None = None) -> bytes:
        """The next message.

        Raises:
            ProtocolError: it is too large. ChannelClosedError: there will be none. TimeoutError: none came in time.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (message := self.try_receive()) is None:
            self._wait(select.POLLIN, deadline)
        return message

    def try_receive(self) -> bytes | None:
        """The next message if all of it is there.

        Raises:
            ProtocolError, ChannelClosedError: as `receive`.
        """
        while (message := self._take()) is None:
            try:
                chunk = self._socket.recv(_CHUNK_BYTES)
            except BlockingIOError:
                return None
            except OSError as error:
                raise ChannelClosedError(f"the channel broke: {error.strerror}") from error
            if not chunk:
                raise ChannelClosedError("the channel was closed at the other end")
            self._received += chunk
        return message

    def _take(self) -> bytes | None:
        """Cut one whole frame off what was received."""
        if len(self._received) < _HEADER.size:
            return None
        (length,) = _HEADER.unpack_from(self._received)
        if length > MAX_FRAME_BYTES:
            raise ProtocolError(f"a message claims {length} bytes, at most {MAX_FRAME_BYTES} are allowed")
        end = _HEADER.size + length
        if len(self._received) < end:
            return None
        message = bytes(self._received[_HEADER.size : end])
        del self._received[:end]
        return message

    def _wait(self, event: int, deadline: float | None) -> None:
        """Return when the socket is ready for `event`, or broken."""
        poll = select.poll()
        poll.register(self._socket, event)
        seconds = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not poll.poll(None if seconds is None else seconds * 1000):
            raise TimeoutError("the process at the other end of the channel did not react in time")
