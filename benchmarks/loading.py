"""How fast weights are read and converted, against the disk: `python -m benchmarks.loading`.

A synthetic checkpoint is read in three ways, cold and warm, in turns: from end to end, which is what the disk can do;
through the loader's reading thread, for one reader and for two processes at once; and by a whole load. Cold means that
the page cache was told to drop the files; `from disk` is the share that the kernel then counted as read from the disk
for this process (of two readers, a byte counts for the one that asks first). Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import REPOSITORY, BenchmarkError, InputError, Spread, check_writable, write_text
from benchmarks.machine import environment_record, publishable
from benchmarks.synthetic import LLAMA_8B, METHODS, write_checkpoint
from converters.read_ahead import ByteRange, ReadAhead, place
from qengine.config import LoadConfig
from qengine.models.shapes import slots
from qengine.runtime.loader import OpenedModel, load_timed, open_model
from qengine.runtime.opening import slot_of
from quant_kernels.linear.dispatch import Target

DEFAULT_JSON = REPOSITORY / "benchmarks" / "results" / "loading-cpu.json"
DISK, READER, TWO, LOAD = "disk, end to end", "loader's reader", "two readers at once", "whole load"
_PART_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Reading:
    """One run. Seconds; `disk_share` of the bytes came from the disk, None where the kernel does not count."""

    seconds: float
    disk_share: float | None
    convert_seconds: float | None = None
    read_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One way of reading over all runs; `num_bytes` in one run."""

    name: str
    is_cold: bool
    num_bytes: int
    readings: tuple[Reading, ...]

    @property
    def rate(self) -> Spread:
        """Bytes per second."""
        return Spread.of([self.num_bytes / reading.seconds for reading in self.readings])

    def median(self, part: Callable[[Reading], float | None]) -> float | None:
        """Of something that every reading has, or none."""
        values = [value for reading in self.readings if (value := part(reading)) is not None]
        return Spread.of(values).median if values else None

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "is_cold": self.is_cold,
            "num_bytes": self.num_bytes,
            "bytes_per_s": self.rate.to_json(),
            "disk_share": self.median(lambda reading: reading.disk_share),
            "read_seconds": self.median(lambda reading: reading.read_seconds),
            "convert_seconds": self.median(lambda reading: reading.convert_seconds),
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 2 for wrong input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parse(arguments)
    logging.getLogger("converters").setLevel(logging.ERROR)
    try:
        check_writable(options.json)
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            path = Path(folder)
            sizes = replace(LLAMA_8B, num_layers=options.layers)
            need = options.layers * 450 * 2**20
            if shutil.disk_usage(path).free < need:
                raise InputError(f"{path} has too little room for {options.layers} layers; give another --folder")
            write_checkpoint(path, sizes, options.method)
            rows = measure(open_model(LoadConfig(model=folder)), options.runs)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(table(rows, options.layers), end="")
    command = shlex.join(["python", "-m", "benchmarks.loading", *publishable(arguments)])
    record = {
        "benchmark": "loading",
        "environment": environment_record(command),
        "method": options.method,
        "num_layers": options.layers,
        "threads": torch.get_num_threads(),
        "rows": [row.to_json() for row in rows],
    }
    write_text(options.json, json.dumps(record, indent=1) + "\n")
    return 0


def measure(opened: OpenedModel, runs: int) -> list[Row]:
    """Every way, cold and warm, in turns."""
    shapes = slots(opened.config, tied=opened.tied)
    ranges = [part for shape in shapes for part in opened.source.ranges(slot_of(shape))]
    ways: dict[str, Callable[[], Reading]] = {
        DISK: lambda: _timed(lambda: _read_plainly(ranges)),
        READER: lambda: _timed(lambda: _read_ahead(ranges)),
        TWO: lambda: _timed(lambda: _read_twice(ranges)),
        LOAD: lambda: _load(opened),
    }
    readings: dict[tuple[str, bool], list[Reading]] = {(name, cold): [] for cold in (True, False) for name in ways}
    for _ in range(runs):
        for (name, is_cold), found in readings.items():
            if is_cold:
                _drop(ranges)
            found.append(ways[name]())
    num_bytes = sum(part.num_bytes for part in ranges)
    shares = {key: tuple(_share(reading, num_bytes) for reading in found) for key, found in readings.items()}
    return [Row(name, is_cold, num_bytes, found) for (name, is_cold), found in shares.items()]


def _share(reading: Reading, num_bytes: int) -> Reading:
    """With the bytes from the disk as a share of all."""
    return reading if reading.disk_share is None else replace(reading, disk_share=reading.disk_share / num_bytes)


def table(rows: Sequence[Row], num_layers: int) -> str:
    """The table that people read. The bound is the disk's end-to-end rate, cold or warm as the row is."""
    bounds = {row.is_cold: row.rate.median for row in rows if row.name == DISK}
    lines = [
        f"{rows[0].num_bytes / 1e9:.2f} GB, {num_layers} layers of an 8B model, {torch.get_num_threads()} threads",
        "",
    ]
    lines.append(f"{'':<26}{'s':>7}{'GB/s':>7}{'low':>7}{'high':>7}{'of bound':>10}{'from disk':>11}{'convert s':>11}")
    for row in rows:
        rate, disk = row.rate, row.median(lambda reading: reading.disk_share)
        convert = row.median(lambda reading: reading.convert_seconds)
        lines.append(
            f"{('cold' if row.is_cold else 'warm') + ', ' + row.name:<26}{row.num_bytes / rate.median:>7.2f}"
            f"{rate.median / 1e9:>7.2f}{rate.low / 1e9:>7.2f}{rate.high / 1e9:>7.2f}"
            f"{rate.median / bounds[row.is_cold]:>10.0%}{'' if disk is None else f'{disk:.0%}':>11}"
            f"{'' if convert is None else f'{convert:.2f}':>11}"
        )
    return "\n".join(lines) + "\n"


# Ways of reading


def _timed(work: Callable[[], None]) -> Reading:
    before, started = _disk_bytes(), time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    after = _disk_bytes()
    return Reading(seconds, None if before is None or after is None else after - before)


def _load(opened: OpenedModel) -> Reading:
    before = _disk_bytes()
    _, times = load_timed(opened, Target.of(torch.device("cpu"), torch.bfloat16), 2048)
    after = _disk_bytes()
    share = None if before is None or after is None else after - before
    return Reading(times.seconds, share, times.convert_seconds, times.read_seconds)


def _read_plainly(ranges: Sequence[ByteRange]) -> None:
    """In the order of the files, into one buffer that is used again: as fast as the disk and the kernel are."""
    buffer = memoryview(bytearray(_PART_BYTES))
    for span in _joined(ranges):
        with span.file.open() as file:
            for offset in range(span.offset, span.end, _PART_BYTES):
                os.preadv(file.descriptor, [buffer[: min(_PART_BYTES, span.end - offset)]], offset)


def _joined(ranges: Sequence[ByteRange]) -> list[ByteRange]:
    """The ranges in the order of their files, with neighbours as one."""
    spans: list[ByteRange] = []
    for wanted in sorted(ranges, key=place):
        last = spans[-1] if spans else None
        if last is not None and last.file == wanted.file and last.end == wanted.offset:
            spans[-1] = ByteRange(last.file, last.offset, last.num_bytes + wanted.num_bytes)
        else:
            spans.append(wanted)
    return spans


def _read_ahead(ranges: Sequence[ByteRange]) -> None:
    """As a load reads, with an asker that does nothing with it."""
    with ReadAhead(ranges) as reader:
        for part in ranges:
            reader.read(part)


def _read_twice(ranges: Sequence[ByteRange]) -> None:
    """As two ranks read the same files at once, each in its process."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _read_ahead(ranges)
            code = 0
        finally:
            os._exit(code)
    _read_ahead(ranges)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
        raise BenchmarkError("the second reader failed")


def _drop(ranges: Sequence[ByteRange]) -> None:
    """Ask the page cache to forget the files."""
    for file in {part.file for part in ranges}:
        with file.open() as opened:
            os.fsync(opened.descriptor)
            os.posix_fadvise(opened.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _disk_bytes() -> int | None:
    """Bytes that this process caused to be read from a disk."""
    try:
        with open("/proc/self/io") as counts:
            return int(next(line for line in counts if line.startswith("read_bytes: ")).split()[1])
    except (OSError, StopIteration):
        return None


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loading", description="How fast weights are read and converted, against the disk."
    )
    parser.add_argument("--layers", type=int, default=8, metavar="N", help="of an 8B model (%(default)s)")
    parser.add_argument("--method", choices=METHODS, default="gptq", help="of quantization (%(default)s)")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="of every way (%(default)s)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="on the disk to measure (the system's for such)")
    parser.add_argument("--json", type=Path, default=DEFAULT_JSON, metavar="FILE", help="where results go")
    options = parser.parse_args(arguments)
    for name in ("layers", "runs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}, expected 1 or more")
    return options


if __name__ == "__main__":
    sys.exit(main())
