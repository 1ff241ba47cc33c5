"""A process that tests fork is what they would have started; it only has torch already."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import forking

COMMAND = (sys.executable, "-m", "tests.self_portrait")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")


def portrait(is_forked: bool, monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, Any]:
    monkeypatch.setattr(forking, "MODULES", {COMMAND[2]} if is_forked else ())
    # Without one, a started process would also have what libraries have set behind Python's back.
    options.setdefault("env", dict(os.environ))
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


def test_it_stays_in_the_session_unless_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    started, forked = (portrait(is_forked, monkeypatch) for is_forked in (False, True))
    assert forked == started
    assert (forked["session"], forked["group"]) == (os.getsid(0), os.getpgid(0))


def test_variables_that_python_reads_at_its_start_count(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"env": {**os.environ, "PYTHONPATH": "/somewhere", "PYTHONSAFEPATH": ""}}
    started, forked = (portrait(is_forked, monkeypatch, **options) for is_forked in (False, True))
    assert forked == started
    assert "/somewhere" in forked["path"]


def test_signals_that_are_ignored_here_are_ignored_there(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        started, forked = (portrait(is_forked, monkeypatch) for is_forked in (False, True))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert forked == started
    assert forked["signals"] != portrait(True, monkeypatch)["signals"]


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


def test_a_server_that_dies_is_an_error_and_another_takes_its_place() -> None:
    servers = forking.ForkServers()
    request = {
        "words": [COMMAND[2], "0"],
        "environment": dict(os.environ),
        "pass_fds": [],
        "start_new_session": False,
        "ignored": [],
    }
    gc.collect()  # What earlier tests left is closed before it is counted.
    before = len(os.listdir("/proc/self/fd"))
    with open(os.devnull, "r+b") as nothing:
        descriptors = [nothing.fileno(), nothing.fileno(), 2]
        for _ in range(2):
            child = servers.fork(request, descriptors)
            assert child is not None
            assert os.waitpid(child, 0)[1] == 0
            [server] = servers._servers.values()
            server._process.kill()
            with pytest.raises(OSError, match=r"server ended|Broken pipe|reset by peer"):
                servers.fork(request, descriptors)
            assert servers._servers == {}
        wrong = {**request, "environment": {**os.environ, "PYTHONPATH": "/", "PYTHONSAFEPATH": "1"}}
        with pytest.raises(OSError, match="did not start"):
            servers.fork(wrong, descriptors)
    servers.close()
    assert len(os.listdir("/proc/self/fd")) == before - 2 * forking._MOST_SERVERS


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (COMMAND[0], {}),
        (COMMAND[:2], {}),
        ((*COMMAND[:2], "qengine"), {}),
        ((Path(COMMAND[0]), *COMMAND[1:], "0"), {}),
        ((*COMMAND, "0"), {"cwd": "/"}),
        ((*COMMAND, "0"), {"umask": 0o77}),
        ((*COMMAND, "0"), {"preexec_fn": os.getpid}),
        ((*COMMAND, "0"), {"executable": COMMAND[0]}),
        ((*COMMAND, "0"), {"close_fds": False}),
        ((*COMMAND, "0"), {"restore_signals": False}),
        ((*COMMAND, "0", "x" * forking.LONGEST_COMMAND), {}),
    ],
)
def test_nothing_else_is_forked(command: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forking, "MODULES", {COMMAND[2]})
    monkeypatch.setattr(forking, "_request", lambda asked: pytest.fail("it was to be forked"))
    nowhere = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    with subprocess.Popen(command, **nowhere, **options) as process:
        process.kill()
    with pytest.raises(pytest.fail.Exception), subprocess.Popen([*COMMAND, "0"], **nowhere):
        pass


@pytest.mark.parametrize("name", sorted(forking.MODULES))
def test_every_module_that_is_named_is_there(name: str) -> None:
    assert importlib.util.find_spec(name) is not None
