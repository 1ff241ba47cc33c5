"""The end of ranks' processes."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time

import pytest

from qengine.parallel import children
from qengine.runtime import rank_processes
from qengine.runtime.rank_processes import RankProcesses
from tests.waiting import WAIT_SECONDS, wait_until


def test_a_process_that_cannot_be_ended_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As one that waits in the kernel for a device: to it SIGKILL is nothing yet."""
    monkeypatch.setattr(children, "REAP_SECONDS", 0.3)
    command = (sys.executable, "-c", "import time; time.sleep(60)")
    processes = RankProcesses(command, 2, {}, lambda reason: None)
    processes.start()
    stuck, sound = (rank.process for rank in processes.ranks)

    def end(process: subprocess.Popen[bytes]) -> None:
        process.terminate()
        # The one that is stuck uses up the time for both.
        process.wait(60.0)

    with monkeypatch.context() as unkillable:
        unkillable.setattr(subprocess.Popen, "kill", lambda self: end(self) if self is sound else None)
        begin = time.monotonic()
        with caplog.at_level(logging.WARNING, "qengine"):
            processes.close(0.0)
        assert time.monotonic() - begin < 10.0
    assert caplog.messages == [f"rank 0 (process {stuck.pid}) was killed and has not ended"]
    assert sound.returncode is not None
    stuck.kill()
    stuck.wait(5.0)


def test_the_last_lines_of_a_process_are_out_when_it_is_closed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real = rank_processes._write

    def write_slowly(prefix: str, line: str) -> None:
        time.sleep(0.05)
        real(prefix, line)

    monkeypatch.setattr(rank_processes, "_write", write_slowly)
    monkeypatch.setattr(rank_processes, "_LAST_LINES_SECONDS", WAIT_SECONDS)
    processes = RankProcesses((sys.executable, "-c", "print('one\\nreason')"), 1, {}, lambda reason: None)
    processes.start()
    processes.ranks[0].process.wait()
    processes.close(0.0)
    assert capfd.readouterr().err == "rank 0: one\nrank 0: reason\n"


def test_a_stopped_process_is_named() -> None:
    command = (sys.executable, "-c", "import time; time.sleep(60)")
    processes = RankProcesses(command, 2, {}, lambda reason: None)
    processes.start()
    try:
        assert processes.stopped() == []
        victim = processes.ranks[1].process
        victim.send_signal(signal.SIGSTOP)
        wait_until(lambda: bool(processes.stopped()))
        assert processes.stopped() == [f"rank 1 (process {victim.pid}) is stopped"]
    finally:
        processes.close(0.0)
    assert processes.stopped() == []
