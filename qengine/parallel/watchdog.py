"""Watchdog: child processes that are not done in time are killed, and the user is told what to try.

A rank that hangs inside NCCL cannot be interrupted, only ended. So the process that starts ranks keeps the watch:

    with Watchdog("NCCL initialization", DEFAULT_LIMIT_S, processes, advice=nccl_advice):
        for channel in channels:
            channel.receive()       # ranks answer after init_process_group and their first all_reduce

When the time is up the processes are killed with their groups, so that whatever waits for them in the block fails; on
the way out that failure becomes a TransportError with the advice. Processes may be added to the list meanwhile.
Invariant: after the block either all was in time, or it raises and none of the processes runs.
"""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Sequence

from qengine.errors import TransportError
from qengine.parallel import children

#: Seconds that ranks may take to find each other.
DEFAULT_LIMIT_S = 30.0
_TOPOLOGY_SECONDS = 5.0
_TOPOLOGY_COMMAND = ("nvidia-smi", "topo", "-m")


class Watchdog:
    """Ends `processes` if its block is not left within `limit_s` seconds.

    Args:
        what: that takes time, as the start of a sentence: "NCCL initialization".
        advice: called for what to try, if it comes to that.
        on_late: called with what was not done, before the processes are killed and whoever watches them wonders.

    Raises:
        TransportError: on leaving the block, if the time was up.
    """

    def __init__(
        self,
        what: str,
        limit_s: float,
        processes: Sequence[subprocess.Popen[bytes]],
        advice: Callable[[], str] | None = None,
        on_late: Callable[[str], None] | None = None,
    ) -> None:
        self._what = what
        self._limit_s = limit_s
        self._processes = processes
        self._advice = advice
        self._on_late = on_late
        self._lock = threading.Lock()
        self._is_over = False
        self._was_late = False
        self._timer = threading.Timer(limit_s, self._bite)
        self._timer.daemon = True

    def __enter__(self) -> Watchdog:
        self._timer.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._timer.cancel()
        with self._lock:
            self._is_over = True
        # An interrupt is not for us to replace.
        if self._was_late and (error is None or isinstance(error, Exception)):
            children.end(self._processes)
            raise TransportError(self._message()) from error

    def _bite(self) -> None:
        with self._lock:
            if self._is_over:
                return
            self._was_late = True
            try:
                if self._on_late is not None:
                    self._on_late(self._what_was_late())
            finally:
                for process in self._processes:
                    children.kill(process)

    def _what_was_late(self) -> str:
        return f"{self._what} did not finish within {self._limit_s:g} s"

    def _message(self) -> str:
        advice = "" if self._advice is None else "\n" + self._advice()
        return f"{self._what_was_late()}; all ranks were ended.{advice}"


def nccl_advice(topology_command: Sequence[str] = _TOPOLOGY_COMMAND) -> str:
    """What to try when cards do not find each other, and how they are connected if nvidia-smi can tell."""
    lines = [
        "The usual cause is cards that claim to reach each other's memory and cannot. Try, in this order:",
        "  --p2p off           no copies from card to card, as NCCL_P2P_DISABLE=1",
        "  NCCL_IB_DISABLE=1   no InfiniBand, if the machine has such a network card",
        "  NCCL_DEBUG=INFO     NCCL says what it is waiting for",
        "  and in the BIOS: IOMMU and ACS off",
    ]
    topology = connections(topology_command)
    return "\n".join([*lines, *(["How the cards are connected:", topology] if topology else [])])


def connections(command: Sequence[str] = _TOPOLOGY_COMMAND) -> str | None:
    """What nvidia-smi says of the cards' connections, or None where it is missing or hangs too."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TOPOLOGY_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
