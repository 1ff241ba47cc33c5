"""A process that tests fork is what they would have started; it only has torch already."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from tests import forking
from tests.runtime import chatty_rank

COMMAND = (sys.executable, "-m", "tests.self_portrait")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")


def portrait(is_forked: bool, monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, Any]:
    monkeypatch.setattr(forking, "MODULES", {COMMAND[2]} if is_forked else ())
    done = subprocess.run([*COMMAND, "3", "a word"], input="said", capture_output=True, text=True, **options)
    assert (done.returncode, done.stderr) == (3, "")
    found: dict[str, Any] = json.loads(done.stdout)
    assert found.pop("has torch") == is_forked
    assert found["heard"] == "said"
    assert found["parent"] == os.getpid()
    return found


def test_it_sees_what_a_started_process_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    passed, other = os.pipe()
    options = {
        "pass_fds": [passed],
        "env": {**os.environ, "ONE_OF_ITS_OWN": "1"},
        "start_new_session": True,
    }
    started, forked = (portrait(is_forked, monkeypatch, **options) for is_forked in (False, True))
    assert forked == started
    assert set(forked["descriptors"]) == {"0", "1", "2", str(passed)}
    assert forked == portrait(True, monkeypatch, **options)
    for descriptor in (passed, other):
        os.close(descriptor)


def test_variables_that_python_reads_at_its_start_count(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"env": {**os.environ, "PYTHONPATH": "/somewhere", "PYTHONSAFEPATH": ""}}
    started, forked = (portrait(is_forked, monkeypatch, **options) for is_forked in (False, True))
    assert forked == started
    assert "/somewhere" in forked["path"]


def test_it_can_be_stopped_and_killed_and_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forking, "MODULES", {COMMAND[2]})
    with subprocess.Popen([*COMMAND, "0"], stdin=subprocess.PIPE) as process:
        assert process.poll() is None
        process.send_signal(signal.SIGSTOP)
        assert os.waitpid(process.pid, os.WUNTRACED)[0] == process.pid
        process.kill()
        assert process.wait(10) == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_only_what_is_named_is_forked() -> None:
    assert chatty_rank.__name__ in forking.MODULES
    assert not any(name in forking.MODULES for name in ("qengine", "converters.quantize", "tests.converters.fuzz"))
