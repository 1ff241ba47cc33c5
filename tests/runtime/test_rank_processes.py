"""The end of ranks' processes."""

from __future__ import annotations

import logging
import subprocess
import sys
import time

import pytest

from qengine.parallel import children
from qengine.runtime.rank_processes import RankProcesses


def test_a_process_that_cannot_be_ended_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As one that waits in the kernel for a device: to it SIGKILL is nothing yet."""
    monkeypatch.setattr(children, "REAP_SECONDS", 0.3)
    command = (sys.executable, "-c", "import time; time.sleep(60)")
    processes = RankProcesses(command, 2, {}, lambda reason: None)
    processes.start()
    stuck, sound = (rank.process for rank in processes.ranks)
    with monkeypatch.context() as unkillable:
        unkillable.setattr(subprocess.Popen, "kill", lambda self: sound.terminate() if self is sound else None)
        begin = time.monotonic()
        with caplog.at_level(logging.WARNING, "qengine"):
            processes.close(0.0)
        assert time.monotonic() - begin < 10.0
    assert caplog.messages == [f"rank 0 (process {stuck.pid}) was killed and has not ended"]
    assert sound.returncode is not None
    stuck.kill()
    stuck.wait(5.0)
