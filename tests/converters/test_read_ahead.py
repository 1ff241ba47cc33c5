"""ReadAhead: the right bytes in any order, bounded memory, and an end that leaves nothing behind."""

from __future__ import annotations

import gc
import mmap
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from converters.errors import CheckpointError
from converters.files import Bytes, DataFile, OpenFile
from converters.read_ahead import MAX_HELD_BYTES, ByteRange, DirectReader, ReadAhead

CONTENT = random.Random(0).randbytes(100_000)
WAIT_SECONDS = 30


@pytest.fixture
def file(tmp_path: Path) -> DataFile:
    (tmp_path / "data").write_bytes(CONTENT)
    return DataFile.at(tmp_path / "data")


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Neither threads nor descriptors."""
    gc.collect()  # What earlier tests left is closed before they are counted.
    descriptors = len(os.listdir("/proc/self/fd"))
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "read-ahead"]
    assert len(os.listdir("/proc/self/fd")) == descriptors


def pieces(file: DataFile, num_bytes: int = 10_000) -> list[ByteRange]:
    return [ByteRange(file, start, num_bytes) for start in range(0, len(CONTENT), num_bytes)]


def content(part: ByteRange) -> bytes:
    return CONTENT[part.offset : part.end]


def wait_until_held(reader: ReadAhead, num_bytes: int) -> None:
    with reader._changed:
        assert reader._changed.wait_for(lambda: reader._held_bytes >= num_bytes, WAIT_SECONDS)


@pytest.mark.parametrize("max_bytes", [1, 10_000, 35_000, 10**9])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_any_order_gives_the_right_bytes(file: DataFile, max_bytes: int, seed: int | None) -> None:
    planned = pieces(file)
    asked = list(planned)
    if seed is not None:
        random.Random(seed).shuffle(asked)
    with ReadAhead(planned, max_bytes=max_bytes) as reader:
        for part in asked:
            assert reader.read(part).tobytes() == content(part)
    assert reader.times.num_bytes == len(CONTENT)


def test_what_was_not_planned_is_read_when_asked_for_and_so_is_what_was_taken(file: DataFile) -> None:
    first, other = ByteRange(file, 0, 100), ByteRange(file, 50, 100)
    with ReadAhead([first, first]) as reader:
        for part in (other, first, first):
            assert reader.read(part).tobytes() == content(part)
    assert reader.times.num_bytes == 300
    assert DirectReader().read(other).tobytes() == content(other)


def test_no_more_is_held_than_allowed(file: DataFile) -> None:
    planned = pieces(file)
    with ReadAhead(planned, max_bytes=35_000) as reader:
        for number, part in enumerate(planned):
            wait_until_held(reader, min(30_000, 10_000 * (len(planned) - number)))
            assert reader._held_bytes <= 35_000
            reader.read(part)


def test_what_is_larger_than_allowed_is_held_alone(file: DataFile) -> None:
    parts = [ByteRange(file, 0, 100), ByteRange(file, 100, 50_000), ByteRange(file, 50_100, 100)]
    with ReadAhead(parts, max_bytes=1000) as reader:
        for part in parts:
            wait_until_held(reader, part.num_bytes)
            assert reader._held_bytes == part.num_bytes
            assert reader.read(part).tobytes() == content(part)


def test_leaving_early_stops_the_thread(file: DataFile) -> None:
    def read_one() -> None:
        with ReadAhead(pieces(file), max_bytes=20_000) as reader:
            reader.read(pieces(file)[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_one()


def test_a_read_under_way_is_stopped_between_its_parts(file: DataFile, monkeypatch: pytest.MonkeyPatch) -> None:
    num_reads, has_begun, may_go_on = 0, threading.Event(), threading.Event()
    plain = os.preadv

    def slow(*arguments: object) -> int:
        nonlocal num_reads
        num_reads += 1
        has_begun.set()
        assert may_go_on.wait(WAIT_SECONDS)
        return plain(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("converters.files._PART_BYTES", 1000)
    monkeypatch.setattr(os, "preadv", slow)
    with ReadAhead([ByteRange(file, 0, len(CONTENT))]) as reader:
        assert has_begun.wait(WAIT_SECONDS)
        reader._is_stopped = True
        may_go_on.set()
    assert num_reads == 1


def test_a_file_that_changed_is_refused_where_it_is_asked_for(file: DataFile) -> None:
    os.truncate(file.path, 50_000)
    with ReadAhead(pieces(file)) as reader, pytest.raises(CheckpointError, match="changed while it was being loaded"):
        reader.read(pieces(file)[0])


def test_a_file_that_is_gone_is_refused(file: DataFile) -> None:
    file.path.unlink()
    with ReadAhead(pieces(file)) as reader, pytest.raises(CheckpointError, match="cannot read"):
        reader.read(pieces(file)[0])


def test_what_was_read_before_an_error_is_still_given(file: DataFile, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, planned = OpenFile.read_into, pieces(file)

    def failing(self: OpenFile, data: Bytes, offset: int, *rest: object) -> None:
        if offset == planned[2].offset:
            raise MemoryError("no room")
        plain(self, data, offset, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(OpenFile, "read_into", failing)
    with ReadAhead(planned) as reader:
        wait_until_held(reader, 20_000)
        assert reader.read(planned[0]).tobytes() == content(planned[0])
        with pytest.raises(MemoryError, match="no room"):
            reader.read(planned[2])
        assert reader.read(planned[1]).tobytes() == content(planned[1])


def test_buffers_are_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size, fresh = 2**20, []

    def make(num_bytes: int) -> mmap.mmap:
        fresh.append(num_bytes)
        return mmap.mmap(-1, num_bytes)

    monkeypatch.setattr("converters.buffers._fresh", make)
    (tmp_path / "large").write_bytes(bytes(32 * size))
    planned = [ByteRange(DataFile.at(tmp_path / "large"), start, size) for start in range(0, 32 * size, size)]
    with ReadAhead(planned, max_bytes=4 * size) as reader:
        for part in planned:
            reader.read(part)
    # Those that are held, one that is read into and one that was given away; not a new one for each of 32.
    assert len(fresh) <= 8


def test_what_may_be_held_at_once_is_read_in_the_order_of_the_files(
    tmp_path: Path, file: DataFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "zeros").write_bytes(bytes(100_000))
    other = DataFile.at(tmp_path / "zeros")
    first = [ByteRange(file, 30_000, 10_000), ByteRange(other, 0, 5_000), ByteRange(file, 0, 10_000)]
    large = [ByteRange(other, 40_000, 50_000)]
    last = [ByteRange(file, 90_000, 10_000), ByteRange(other, 20_000, 10_000), ByteRange(file, 60_000, 10_000)]
    plain, order = OpenFile.read_into, []

    def noting(self: OpenFile, data: Bytes, offset: int, *rest: object) -> None:
        order.append((self.file.path.name, offset))
        plain(self, data, offset, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(OpenFile, "read_into", noting)
    with ReadAhead([*first, *large, *last], max_bytes=30_000) as reader:
        for part in (*first, *large, *last):
            assert len(reader.read(part)) == part.num_bytes
            assert reader._held_bytes <= 30_000 or list(reader._held) == large
    batches = [sorted((part.file.path.name, part.offset) for part in batch) for batch in (first, large, last)]
    assert order == [place for batch in batches for place in batch]


def test_how_much_is_held_follows_the_ranges(file: DataFile) -> None:
    def held(sizes: list[int]) -> int:
        return ReadAhead([ByteRange(file, number, size) for number, size in enumerate(sizes)])._max_bytes

    assert held([]) == 0
    assert held([100, 300, 200]) == 600
    assert held([100] * 80) == 1000
    assert held([2**30]) == MAX_HELD_BYTES
