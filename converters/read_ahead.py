"""ReadAhead: a thread that reads what will be asked for next, while the asker converts what it has.

    planned ranges   | taken | taken | held, at most `max_bytes` | later ...
                                       ^ preads of 16 MiB

Ranges are read in the order of the plan, which is the model's, but as many as may be held at once in the order of the
file: most of a layer's are neighbours there, so the system's own read-ahead keeps the disk busy. (Asking it for more
cost a third of the rate: pages that are asked for come one by one.)
Ranks in other processes share the page cache: the first one's reads are copies in memory for the others, so each byte
comes off the disk once as long as they stay so close to each other that the cache still holds it.
Buffers are used again, since the first touch of fresh memory takes longer than the copy into it.
Files are read and never mapped: a fault on every page is three times slower, and a file that shrinks would end the
process. Invariant: whatever ends the `with`, the thread has ended and no file is open after it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from converters.buffers import Buffers
from converters.files import Bytes, DataFile, OpenFile

#: Bytes that are held for the asker; a range that is larger waits until nothing else is held. Buffers that wait to be
#: used again may have half as much, and what is left of it.
MAX_HELD_BYTES = 128 * 2**20


@dataclass(frozen=True, slots=True)
class ByteRange:
    """A part of a file that is read at once."""

    file: DataFile
    offset: int
    num_bytes: int

    @property
    def end(self) -> int:
        return self.offset + self.num_bytes


class Reader(Protocol):
    """How bytes get here."""

    def read(self, wanted: ByteRange) -> Bytes:
        """uint8 [num_bytes]. Raises CheckpointError."""
        ...


class DirectReader:
    """Reads when it is asked."""

    def read(self, wanted: ByteRange) -> Bytes:
        return wanted.file.read(wanted.offset, wanted.num_bytes)


@dataclass(slots=True)
class ReadTimes:
    """What reading took.

    Attributes:
        num_bytes: read so far.
        busy_seconds: that the thread spent in reads.
        waited_seconds: that the asker spent waiting for them.
    """

    num_bytes: int = 0
    busy_seconds: float = 0.0
    waited_seconds: float = 0.0


class _StoppedError(Exception):
    """The reading is no longer wanted."""


class ReadAhead:
    """A Reader that has read before it is asked; use it in a `with`, from one thread.

    Args:
        ranges: in the order in which they will be asked for. Others, and the same ones again, are read when asked for.
        max_bytes: how much is held that was not asked for yet; half as much waits in buffers to be used again. By
            default twice the largest range or an eighth of all, and no more than `MAX_HELD_BYTES`.
    """

    def __init__(self, ranges: Sequence[ByteRange], *, max_bytes: int | None = None) -> None:
        self.times = ReadTimes()
        self._ranges = list(dict.fromkeys(ranges))
        self._max_bytes = _window(self._ranges) if max_bytes is None else max_bytes
        self._changed = threading.Condition()
        self._planned = set(self._ranges)
        self._buffers = Buffers()
        self._held: dict[ByteRange, Bytes] = {}
        self._held_bytes = 0
        self._asked: ByteRange | None = None
        self._is_stopped = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)

    def __enter__(self) -> ReadAhead:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
        self._thread.join()
        self._held.clear()
        self._buffers.clear()

    def read(self, wanted: ByteRange) -> Bytes:
        """The range's bytes, which are the caller's from here on.

        Raises:
            CheckpointError: if the file changed, or cannot be read.
        """
        if wanted not in self._planned:
            return self._read_now(wanted)
        started = time.perf_counter()
        with self._changed:
            self._planned.discard(wanted)
            # Who asks out of order must not wait for room that only it can make.
            self._asked = wanted
            self._changed.notify_all()
            while wanted not in self._held and self._error is None:
                self._changed.wait()
            self._asked = None
            self.times.waited_seconds += time.perf_counter() - started
            if wanted not in self._held:
                assert self._error is not None, "the wait ends with the range or an error"
                raise self._error
            data = self._held.pop(wanted)
            self._held_bytes -= wanted.num_bytes
            self._changed.notify_all()
        return data

    def _read_now(self, wanted: ByteRange) -> Bytes:
        started = time.perf_counter()
        data = wanted.file.read(wanted.offset, wanted.num_bytes)
        seconds = time.perf_counter() - started
        with self._changed:
            self.times.num_bytes += wanted.num_bytes
            self.times.busy_seconds += seconds
            self.times.waited_seconds += seconds
        return data

    # The thread

    def _run(self) -> None:
        try:
            with ExitStack() as stack:
                files: dict[DataFile, OpenFile] = {}
                for file in dict.fromkeys(wanted.file for wanted in self._ranges):
                    files[file] = stack.enter_context(file.open())
                for wanted in _in_file_order(self._ranges, self._max_bytes):
                    self._wait_for_room(wanted)
                    self._deliver(wanted, self._read(files[wanted.file], wanted))
        except _StoppedError:
            pass
        except BaseException as error:  # noqa: BLE001 - whatever it is, the asker must hear of it.
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _wait_for_room(self, wanted: ByteRange) -> None:
        with self._changed:
            while not (self._is_stopped or self._is_missing() or self._fits(wanted)):
                self._changed.wait()
            self._require_wanted()

    def _is_missing(self) -> bool:
        return self._asked is not None and self._asked not in self._held

    def _fits(self, wanted: ByteRange) -> bool:
        return not self._held or self._held_bytes + wanted.num_bytes <= self._max_bytes

    def _require_wanted(self) -> None:
        if self._is_stopped:
            raise _StoppedError

    def _read(self, file: OpenFile, wanted: ByteRange) -> Bytes:
        started = time.perf_counter()

        def after_part(num_bytes: int) -> None:
            nonlocal started
            now = time.perf_counter()
            with self._changed:
                self.times.num_bytes += num_bytes
                self.times.busy_seconds += now - started
                self._require_wanted()
            started = now

        data = self._buffers.take(wanted.num_bytes)
        self._buffers.trim(self._max_bytes * 3 // 2 - self._held_bytes - wanted.num_bytes)
        file.read_into(data, wanted.offset, after_part)
        return data

    def _deliver(self, wanted: ByteRange, data: Bytes) -> None:
        with self._changed:
            self._held[wanted] = data
            self._held_bytes += wanted.num_bytes
            self._changed.notify_all()


def _window(ranges: Sequence[ByteRange]) -> int:
    """Bytes to hold by default."""
    sizes = [wanted.num_bytes for wanted in ranges]
    return min(MAX_HELD_BYTES, max(2 * max(sizes, default=0), sum(sizes) // 8))


def _in_file_order(ranges: Sequence[ByteRange], max_bytes: int) -> Iterator[ByteRange]:
    """The ranges, neighbours of up to `max_bytes` together in the order of their files."""
    batch: list[ByteRange] = []
    num_bytes = 0
    for wanted in ranges:
        if num_bytes + wanted.num_bytes > max_bytes:
            yield from sorted(batch, key=place)
            batch, num_bytes = [], 0
        batch.append(wanted)
        num_bytes += wanted.num_bytes
    yield from sorted(batch, key=place)


def place(wanted: ByteRange) -> tuple[str, int]:
    """What ranges are sorted by to be in the order of their files."""
    return str(wanted.file.path), wanted.offset
