"""Processes that never get ready are ended in time, with all they have started, and the user learns what to try."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from qengine.errors import TransportError
from qengine.parallel import children, watchdog
from qengine.parallel.watchdog import Watchdog, connections, nccl_advice

#: Longer than any step of these tests takes on a busy machine.
PATIENCE_S = 60.0
#: A rank whose initialization stalls: it ignores what a polite end would send, and has started a process of its own.
STALLED = (
    "import signal, subprocess, sys, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], stdout=subprocess.DEVNULL)\n"
    "print(child.pid, flush=True)\n"
    "time.sleep(600)\n"
)
READY = "print('ready', flush=True)"


@contextmanager
def started(*codes: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True) for code in codes
    ]
    try:
        yield processes
    finally:
        children.end(processes)
        for process in processes:
            assert process.stdout is not None
            process.stdout.close()


def line_of(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    return process.stdout.readline()


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_for_end(pid: int) -> None:
    """A grandchild is reaped by somebody else, in its own time."""
    deadline = time.monotonic() + PATIENCE_S
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(0.01)


def wait_for_ranks(processes: list[subprocess.Popen[bytes]], limit_s: float) -> None:
    """What an engine does: wait for an answer of each rank, under the watchdog."""
    with Watchdog("NCCL initialization", limit_s, processes, nccl_advice):
        for rank, process in enumerate(processes):
            if not line_of(process):
                raise EOFError(f"rank {rank} has closed its channel")


def test_a_stalled_initialization_is_ended_and_explained() -> None:
    with started(STALLED) as processes:
        grandchild = int(line_of(processes[0]))
        with pytest.raises(TransportError, match=r"(?s)NCCL init.* did not finish within 0\.2 s.*--p2p off") as caught:
            wait_for_ranks(processes, 0.2)
        assert isinstance(caught.value.__cause__, EOFError), "the wait ends because the stalled rank does"
        assert processes[0].returncode == -signal.SIGKILL
        wait_for_end(grandchild)


def test_ranks_that_are_ready_end_with_one_that_is_not() -> None:
    with started(READY, STALLED) as processes:
        line_of(processes[1])
        with pytest.raises(TransportError):
            wait_for_ranks(processes, 0.5)
        assert all(process.returncode is not None for process in processes)


def test_a_stopped_rank_is_ended_too() -> None:
    with started(STALLED) as processes:
        line_of(processes[0])
        processes[0].send_signal(signal.SIGSTOP)
        with pytest.raises(TransportError), Watchdog("initialization", 0.1, processes):
            line_of(processes[0])
        assert processes[0].returncode == -signal.SIGKILL


def test_a_rank_that_does_not_lead_a_group_is_ended_without_its_parents_group() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stdout=subprocess.PIPE)
    with process:
        assert os.getpgid(process.pid) == os.getpgid(0)
        with pytest.raises(TransportError), Watchdog("initialization", 0.1, [process]):
            line_of(process)
        assert process.returncode == -signal.SIGKILL


def test_what_is_done_in_time_is_left_alone() -> None:
    with started(STALLED) as processes:
        with Watchdog("initialization", PATIENCE_S, processes):
            line_of(processes[0])
        assert processes[0].poll() is None


def test_an_error_in_time_stays_what_it_is() -> None:
    with pytest.raises(ZeroDivisionError), Watchdog("initialization", PATIENCE_S, []):
        _ = 1 / 0


def test_an_interrupt_is_not_replaced() -> None:
    def wait_and_interrupt() -> None:
        with Watchdog("initialization", 0.05, processes):
            while line_of(processes[0]):
                pass
            raise KeyboardInterrupt

    with started(STALLED) as processes:
        with pytest.raises(KeyboardInterrupt):
            wait_and_interrupt()
        assert processes[0].wait(PATIENCE_S) == -signal.SIGKILL


def test_advice_shows_how_cards_are_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_TOPOLOGY_SECONDS", PATIENCE_S)
    advice = nccl_advice([sys.executable, "-c", "print('GPU0 X PHB')"])
    assert "NCCL_IB_DISABLE=1" in advice
    assert advice.endswith("How the cards are connected:\nGPU0 X PHB")


@pytest.mark.parametrize("command", [["no-such-program"], [sys.executable, "-c", "raise SystemExit(3)"]])
def test_advice_does_without_nvidia_smi(command: list[str]) -> None:
    assert connections(command) is None
    assert "--p2p off" in nccl_advice(command)


@pytest.mark.parametrize(
    ("code", "words"),
    [(1, "ended with exit code 1"), (-11, "was ended by SIGSEGV"), (-9, "was ended by SIGKILL"), (-250, "signal 250")],
)
def test_ends_are_told_in_words(code: int, words: str) -> None:
    assert words in children.how_it_ended(code)
