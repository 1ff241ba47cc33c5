"""The processes of a model's ranks: started, watched, and ended.

Each rank is a Python process of its own with a socket to this one; what it writes is forwarded to standard error, line
by line, with the rank in front. Invariant: one thread starts the processes and lives as long as they do, since the
kernel ends them with that thread (see `parent_death`); it tells of each that dies before its time within milliseconds.
After `close` none is left. What is said over the sockets is the executor's business.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from qengine.errors import LoadError
from qengine.parallel import children
from qengine.runtime.channel import Channel

logger = logging.getLogger(__name__)

_REAP_SECONDS = 1.0
#: For the last lines of ranks that have ended.
_LAST_LINES_SECONDS = 0.5
_POLL_SECONDS = 0.01
#: States of a process in /proc that does nothing until somebody tells it to go on.
_STOPPED = ("T", "t")


@dataclass(frozen=True, slots=True)
class RankProcess:
    """One rank's process, the channel to it, and the thread that forwards what it writes."""

    rank: int
    process: subprocess.Popen[bytes]
    channel: Channel
    forwarder: threading.Thread

    def obituary(self) -> str | None:
        """How it ended; None while it lives."""
        code = self.process.poll()
        if code is None:
            return None
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"{self} {how}"

    def is_stopped(self) -> bool:
        """Whether a signal has stopped it (SIGSTOP), or a debugger."""
        try:
            # The state comes after the name, which may contain anything.
            fields = Path(f"/proc/{self.process.pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            return False
        return fields[0] in _STOPPED

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.process.pid})"


class RankProcesses:
    """`count` processes; `start` starts them.

    Args:
        command: the program and its first arguments; the socket's number and this process's id come after them.
        environment: theirs.
        inherited: descriptors that each of them gets, by rank; none where it is empty.
        on_death: called in the watching thread for each process that ends before `close`, with how it ended.
    """

    def __init__(
        self,
        command: Sequence[str],
        count: int,
        environment: Mapping[str, str],
        on_death: Callable[[str], None],
        inherited: Sequence[Sequence[int]] = (),
    ) -> None:
        assert len(inherited) in (0, count), "descriptors for each rank, or for none"
        self.ranks: list[RankProcess] = []
        self._on_death = on_death
        self._is_closing = False
        self._start_errors: list[OSError] = []
        self._started = threading.Event()
        self._waker, self._wakened = socket.socketpair()
        self._thread = threading.Thread(
            target=self._run, args=(command, inherited or [()] * count, environment), name="qengine-ranks", daemon=True
        )

    def start(self) -> None:
        """Start them and the thread that watches them.

        Raises:
            LoadError: they cannot be started.
        """
        self._thread.start()
        self._started.wait()
        for error in self._start_errors:
            self.close(0.0)
            raise LoadError(f"the processes of the ranks cannot be started: {error}")

    def obituaries(self, within: float) -> list[str]:
        """How those ended that have; waits up to `within` seconds for the first."""
        deadline = time.monotonic() + within
        while True:
            found = [text for rank in self.ranks if (text := rank.obituary()) is not None]
            if found or time.monotonic() >= deadline:
                return found
            time.sleep(_POLL_SECONDS)

    def stopped(self) -> list[str]:
        """Which ranks are stopped: they do nothing, and the others wait for them."""
        return [f"{rank} is stopped" for rank in self.ranks if rank.is_stopped()]

    def kill(self) -> None:
        """End all of them at once; what they have in hand is lost."""
        self._is_closing = True
        for rank in self.ranks:
            rank.process.kill()

    def close(self, grace: float) -> None:
        """Wait up to `grace` seconds for them to end, kill the others, release everything. Idempotent.

        One that the kernel cannot end in time, as where a device does not answer it, is left to it.
        """
        self._is_closing = True
        deadline = time.monotonic() + grace
        for rank in self.ranks:
            with suppress(subprocess.TimeoutExpired):
                rank.process.wait(max(0.0, deadline - time.monotonic()))
        self.kill()
        deadline = time.monotonic() + children.REAP_SECONDS
        for rank in self.ranks:
            try:
                rank.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                logger.warning("%s was killed and has not ended", rank)
        deadline = time.monotonic() + _LAST_LINES_SECONDS
        for rank in self.ranks:
            # Often the only ones that say why; but what a rank has started may hold the pipe open.
            rank.forwarder.join(max(0.0, deadline - time.monotonic()))
        self._waker.close()
        self._thread.join()
        for rank in self.ranks:
            rank.channel.close()

    # In the watching thread

    def _run(self, command: Sequence[str], inherited: Sequence[Sequence[int]], environment: Mapping[str, str]) -> None:
        try:
            for rank, descriptors in enumerate(inherited):
                self.ranks.append(_start(command, rank, environment, descriptors))
        except OSError as error:
            self._start_errors.append(error)
        finally:
            self._started.set()
        self._watch()
        self._wakened.close()

    def _watch(self) -> None:
        """Tell of each process that ends, until `close`."""
        by_file = {rank.channel.fileno(): rank for rank in self.ranks}
        poll = select.poll()
        for file in by_file:
            poll.register(file, 0)  # Only the end of the other side is waited for.
        poll.register(self._wakened, 0)
        while True:
            for file, _ in poll.poll():
                if file == self._wakened.fileno():
                    return
                poll.unregister(file)
                self._mourn(by_file[file])

    def _mourn(self, rank: RankProcess) -> None:
        with suppress(subprocess.TimeoutExpired):
            rank.process.wait(_REAP_SECONDS)
        if not self._is_closing:
            self._on_death(rank.obituary() or f"rank {rank.rank} has closed its channel")


def _start(command: Sequence[str], rank: int, environment: Mapping[str, str], inherited: Sequence[int]) -> RankProcess:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [*command, str(theirs.fileno()), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[theirs.fileno(), *inherited],
            env=environment,
            # Out of the terminal's group: Ctrl-C reaches the engine alone.
            start_new_session=True,
        )
    assert process.stdout is not None
    forward = threading.Thread(target=_forward, args=(process.stdout, rank), name=f"qengine-log-{rank}", daemon=True)
    forward.start()
    return RankProcess(rank, process, Channel(ours), forward)


def _forward(output: IO[bytes], rank: int) -> None:
    """Copy a rank's output to standard error until it ends; a progress bar's steps end with a carriage return."""
    prefix, line = f"rank {rank}: ", b""
    with output:
        while chunk := os.read(output.fileno(), 4096):
            *whole, line = (line + chunk).replace(b"\r", b"\r\n").split(b"\n")
            for piece in whole:
                _write(prefix, piece.decode(errors="replace"))
    if line:
        _write(prefix, line.decode(errors="replace"))


def _write(prefix: str, line: str) -> None:
    """One line; one that ends with a carriage return is overwritten by the next."""
    text = line.rstrip("\r")
    with suppress(OSError, ValueError):  # Nobody reads standard error any more.
        if text:
            sys.stderr.write(prefix + text + ("\r" if line.endswith("\r") else "\n"))
            sys.stderr.flush()
