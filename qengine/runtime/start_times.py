"""StartTimes: where the seconds of a start go.

Phases follow each other, and their seconds add up to the total. Reading and converting weights overlap within one of
them, so each has the seconds that it was busy. Invariant: nothing here influences the start.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping

from qengine.runtime.loader import LoadTimes

IMPORT, WEIGHTS, READ, CONVERT, TOTAL = "import", "weights", "read", "convert", "total"


def process_age() -> float:
    """Seconds since this process began; 0 where the system does not tell."""
    try:
        with open("/proc/self/stat") as stat:
            # The name, in parentheses, may hold anything; what follows it is field 3.
            fields = stat.read().rpartition(")")[2].split()
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - began)
    except (OSError, ValueError, IndexError):
        return 0.0


class StartTimes:
    """A stopwatch with named laps.

    Args:
        import_seconds: what the process took before, 0 where that says nothing of the engine.
        clock: seconds that only grow.
    """

    def __init__(self, import_seconds: float = 0.0, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._phases: dict[str, float] = {IMPORT: import_seconds} if import_seconds else {}
        self._loading: LoadTimes | None = None
        self._last = clock()

    def lap(self, phase: str) -> None:
        """What was done since the last lap was `phase`."""
        now = self._clock()
        self._phases[phase] = self._phases.get(phase, 0.0) + now - self._last
        self._last = now

    def loaded(self, times: LoadTimes) -> None:
        """Ends the phase "weights", with what it consisted of."""
        self._loading = times
        self.lap(WEIGHTS)

    @property
    def seconds(self) -> Mapping[str, float]:
        """By phase, with "total"; "read" and "convert" are parts of "weights" that overlap."""
        parts = {}
        if self._loading is not None:
            parts = {READ: self._loading.read_seconds, CONVERT: self._loading.convert_seconds}
        return {**self._phases, **parts, TOTAL: sum(self._phases.values())}

    def table(self) -> str:
        """Lines for people."""
        lines = ["start            s"]
        for phase, seconds in self._phases.items():
            lines.append(f"  {phase:<10}{seconds:8.2f}")
            if phase == WEIGHTS and self._loading is not None:
                lines += self._loading_lines(self._loading)
        return "\n".join([*lines, f"  {TOTAL:<10}{self.seconds[TOTAL]:8.2f}"])

    @staticmethod
    def _loading_lines(times: LoadTimes) -> list[str]:
        """Nothing was read for weights that are made up."""
        lines = [f"    {CONVERT:<10}{times.convert_seconds:6.2f} busy"]
        if times.num_bytes:
            rate = times.num_bytes / max(times.read_seconds, 1e-9) / 1e9
            amount = f"{times.num_bytes / 1e9:.2f} GB at {rate:.2f} GB/s"
            lines.insert(0, f"    {READ:<10}{times.read_seconds:6.2f} busy, {amount}, while others are converted")
        return lines
