"""StartTimes: where the seconds of a start go.

Phases follow each other, and their seconds add up to the total. Reading and converting weights overlap within one of
them, so each has the seconds that it was busy; of several ranks, which load at the same time, those of the slowest.
Invariant: nothing here influences the start.
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
        self._loading: tuple[LoadTimes, ...] = ()
        self._last = clock()

    def lap(self, phase: str) -> None:
        """What was done since the last lap was `phase`."""
        now = self._clock()
        self._phases[phase] = self._phases.get(phase, 0.0) + now - self._last
        self._last = now

    def loaded(self, *times: LoadTimes) -> None:
        """Ends the phase "weights", with what it consisted of, on each rank."""
        self._loading = times
        self.lap(WEIGHTS)

    @property
    def seconds(self) -> Mapping[str, float]:
        """By phase, with "total"; "read" and "convert" are parts of "weights" that overlap."""
        parts = {}
        if self._loading:
            parts = {
                READ: max(times.read_seconds for times in self._loading),
                CONVERT: max(times.convert_seconds for times in self._loading),
            }
        return {**self._phases, **parts, TOTAL: sum(self._phases.values())}

    def table(self) -> str:
        """Lines for people."""
        lines = ["start            s"]
        for phase, seconds in self._phases.items():
            lines.append(f"  {phase:<10}{seconds:8.2f}")
            if phase == WEIGHTS and self._loading:
                lines += self._loading_lines()
        return "\n".join([*lines, f"  {TOTAL:<10}{self.seconds[TOTAL]:8.2f}"])

    def _loading_lines(self) -> list[str]:
        """Nothing was read for weights that are made up."""
        num_ranks = len(self._loading)
        whose = f" (the slowest of {num_ranks} ranks)" if num_ranks > 1 else ""
        lines = [f"    {CONVERT:<10}{self.seconds[CONVERT]:6.2f} busy{whose}"]
        slowest = max(self._loading, key=lambda times: times.read_seconds)
        if slowest.num_bytes:
            rate = slowest.num_bytes / max(slowest.read_seconds, 1e-9) / 1e9
            amount = f"{slowest.num_bytes / 1e9:.2f} GB at {rate:.2f} GB/s"
            lines.insert(
                0, f"    {READ:<10}{slowest.read_seconds:6.2f} busy, {amount}, while others are converted{whose}"
            )
        return lines
