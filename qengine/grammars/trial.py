"""Trial: each grammar is first compiled in a process of its own, which may hang, crash or be killed.

Invariant: `run` returns or raises within its time limit, whatever the source, and a process that failed is never used
again. A source is judged by the processor time that it takes; what takes `CLOCK_FACTOR` times as long by the clock is
given up, and no fault of the source. Processes start when they are needed and end with their owner. Thread-safe.
"""

from __future__ import annotations

import queue
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Any

from qengine.errors import EngineDeadError, GrammarError, QEngineError
from qengine.grammars.sources import GrammarSource
from qengine.grammars.trial_process import receive, send, vocabulary_message
from qengine.grammars.vocabulary import Vocabulary

NUM_PROCESSES = 2
#: A busy machine needs a while to start an interpreter.
START_SECONDS = 60.0
CLOCK_FACTOR = 5.0


class TooCostlyError(GrammarError):
    """Compiling took more time than it may, or ended its process. Elsewhere, or later, it might not."""


class TooSlowError(QEngineError):
    """The process hangs, or is not let to compute: the computer is too busy, or somebody has stopped it."""


class _Process:
    """One process, started."""

    def __init__(self, vocabulary: Vocabulary, seconds: float) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "qengine.grammars.trial_process", str(seconds), str(2 * CLOCK_FACTOR * seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        if self.ask(vocabulary_message(vocabulary), START_SECONDS) is None:
            raise RuntimeError("the process that tries grammars does not start")

    @property
    def process_id(self) -> int:
        return self._process.pid

    @property
    def end(self) -> int | None:
        """How it ended, as `Popen.returncode`; None while it runs."""
        return self._process.poll()

    def ask(self, message: Any, seconds: float) -> Any:
        """The answer to a message; None if the process died or was killed after `seconds`."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            send(stdin, message)
            # Not select(): a server has more open files than that can name.
            poll = select.poll()
            poll.register(stdout, select.POLLIN)
            answer = receive(stdout) if poll.poll(seconds * 1000) else None
        except OSError:
            answer = None
        if answer is None:
            self.kill()
        return answer

    def kill(self) -> None:
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except OSError:  # What was not written is lost with the process.
                    continue
        self._process.wait()


class Trial:
    """A few processes that try grammars.

    Args:
        vocabulary: the tokens to try them with.
        seconds: of processor time for one source.
    """

    def __init__(self, vocabulary: Vocabulary, seconds: float) -> None:
        self._vocabulary = vocabulary
        self._seconds = seconds
        # None: a place for a process that is not started.
        self._places: queue.LifoQueue[_Process | None] = queue.LifoQueue()
        for _ in range(NUM_PROCESSES):
            self._places.put(None)
        self._is_closed = threading.Event()

    def run(self, source: GrammarSource) -> str:
        """What the library reads for `source`.

        Raises:
            GrammarError: it is no valid grammar.
            TooCostlyError: compiling it took too much time or memory.
            TooSlowError: its process was given up. EngineDeadError: it is closed.
        """
        process = self._places.get()
        try:
            if self._is_closed.is_set():
                raise EngineDeadError("the engine has been shut down")
            if process is not None and process.end is not None:
                # Whoever ended it while it waited, it was not for this source.
                process.kill()
                process = None
            process = process or _Process(self._vocabulary, self._seconds)
            begin = time.monotonic()
            message = {"kind": source.kind, "text": source.text, "lead": source.lead}
            answer = process.ask(message, CLOCK_FACTOR * self._seconds)
            if answer is None:
                failed, process = process, None
                raise self._failure(failed.end, time.monotonic() - begin)
        finally:
            self._places.put(process)
            if self._is_closed.is_set():
                self.close()
        if "error" in answer:
            raise GrammarError(answer["error"])
        return str(answer["text"])

    def _failure(self, end: int | None, seconds: float) -> QEngineError:
        """What went wrong, by how a process ended, and after how long."""
        limit = CLOCK_FACTOR * self._seconds
        if end != -signal.SIGPROF and seconds >= limit:
            return TooSlowError(
                f"the grammar was not compiled within {limit:g} s: the computer is busy; try again later"
            )
        excess = f"longer than {self._seconds:g} s" if end == -signal.SIGPROF else "too much memory"
        return TooCostlyError(f"it takes {excess} to compile; make it simpler")

    def idle_process_ids(self) -> list[int]:
        """The processes that run and wait."""
        return [process.process_id for process in list(self._places.queue) if process is not None]

    def close(self) -> None:
        """End the processes; those in use end when they have answered. Idempotent."""
        self._is_closed.set()
        places = []
        with suppress(queue.Empty):
            while True:
                places.append(self._places.get_nowait())
        for process in places:
            if process is not None:
                process.kill()
            self._places.put(None)
