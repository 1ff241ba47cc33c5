"""Ranks and probes of tests, forked from a process that has torch: to import it is most of what they would do.

Tests start some hundred and fifty of them. While `quick_start` is on, `subprocess.Popen` has the modules below forked
by `tests.fork_server`. Invariant: such a process is what Popen would have started, a child of this one with its command
line, descriptors, environment, session and ignored signals. What is not the same: torch is there before its first line;
strings hash alike in all of them, and numpy's numbers begin alike; limits and umask are those of this process's start;
and it is told of the end of this process, not of the thread that asked. What people start themselves is never forked,
so the ranks of a server that a test starts are not either; nor is what measures its own memory or time.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest.mock import patch

from tests.fork_server import ASIDE, LARGEST_REQUEST, LONGEST_COMMAND, MOST_DESCRIPTORS, READY

MODULES = frozenset(
    {
        "qengine.runtime.rank",
        "qengine.parallel.peer_probe",
        "tests.benchmarks.tiny_rank",
        "tests.parallel.faulty_probe",
        "tests.parallel.staged_rank",
        "tests.runtime.chatty_rank",
        "tests.runtime.failing_rank",
        "tests.runtime.stalled_rank",
    }
)
#: Python and the libraries read these once, when they are loaded: a server answers for one set of them.
_READ_AT_START = (
    *("PYTHON", "LC_", "LANG", "TZ", "LD_", "GLIBC_", "MALLOC_"),
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "PYTORCH_", "TORCH", "TRITON", "CUDA"),
)
#: Arguments of `Popen._execute_child` with which a process can be forked as asked.
_PLAIN = {
    "close_fds": True,
    "restore_signals": True,
    "shell": False,
    "umask": -1,
    "process_group": -1,
    **dict.fromkeys(("preexec_fn", "executable", "gid", "gids", "uid")),
}
#: A server imports torch before it answers, on a machine that may be busy.
_LIMIT_S = 120.0
_PADDING = " " * LONGEST_COMMAND
_MOST_SERVERS = 4
_PR_SET_CHILD_SUBREAPER = 36


class ForkServer:
    """A process that forks others, with one set of the variables that are read at its start.

    Args:
        pair: connected sockets. Both descriptors stay open: tests count those of this process.
    """

    def __init__(self, environment: Mapping[str, str], pair: tuple[socket.socket, socket.socket]) -> None:
        self._control, self._theirs = pair
        self._control.settimeout(_LIMIT_S)
        self._is_ready = False
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server", str(self._theirs.fileno()), _PADDING],
            stdin=subprocess.DEVNULL, pass_fds=[self._theirs.fileno()], env=environment,
        )  # fmt: skip
        # Only the server has its end now, so that its own end is noticed.
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), self._theirs.fileno(), inheritable=False)

    def fork(self, request: Mapping[str, Any], descriptors: Sequence[int]) -> int:
        """The id of a new child of this process. One thread at a time.

        Raises:
            OSError: the server does not answer, or the process failed. It is not to be asked again.
        """
        text = json.dumps(request).encode()
        assert len(text) <= LARGEST_REQUEST
        if not self._is_ready and self._control.recv(32) != READY:
            raise OSError("the fork server did not start; what it printed says why")
        self._is_ready = True
        with _orphans_are_ours():
            socket.send_fds(self._control, [text], descriptors)
            child = self._control.recv(32)
        if not child:
            raise OSError("the fork server ended, or what it forked did before it was what it should be")
        return int(child)

    def close(self) -> None:
        self._control.close()
        self._theirs.close()
        try:
            self._process.wait(_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class ForkServers:
    """A server for each set of variables that is asked for, as long as there are sockets; in one folder."""

    def __init__(self) -> None:
        self.folder = os.getcwd()
        # To take in orphans is a matter of the whole process.
        self._lock = threading.Lock()
        self._pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(_MOST_SERVERS)]
        self._servers: dict[frozenset[tuple[str, str]], ForkServer] = {}

    def fork(self, request: Mapping[str, Any], descriptors: Sequence[int]) -> int | None:
        """The id of a new child of this process; None if there is no server for its environment.

        Raises:
            OSError: the server does not answer, or the process failed.
        """
        kind = frozenset(item for item in request["environment"].items() if item[0].startswith(_READ_AT_START))
        with self._lock:
            if kind not in self._servers and self._pairs:
                self._servers[kind] = ForkServer(request["environment"], self._pairs.pop())
            if kind not in self._servers:
                return None
            try:
                return self._servers[kind].fork(request, descriptors)
            except BaseException:
                # An answer that is still to come would be taken for that to the next request.
                self._servers.pop(kind).close()
                raise

    def close(self) -> None:
        for server in self._servers.values():
            server.close()
        for ours, theirs in self._pairs:
            ours.close()
            theirs.close()


@contextlib.contextmanager
def quick_start() -> Iterator[None]:
    """Fork the modules above while the block runs, where this is Linux."""
    if sys.platform != "linux":
        yield
        return
    servers = ForkServers()
    try:
        with patch.object(subprocess.Popen, "_execute_child", _forking(servers)):
            yield
    finally:
        servers.close()


def _forking(servers: ForkServers) -> Callable[..., None]:
    """`Popen._execute_child`, which forks what can be forked."""
    real = vars(subprocess.Popen)["_execute_child"]
    signature = inspect.signature(real)

    def execute_child(process: Any, *arguments: Any) -> None:
        asked = signature.bind(process, *arguments).arguments
        child = None
        if _can_be_forked(asked, servers.folder):
            files = [asked["p2cread"], asked["c2pwrite"], asked["errwrite"]]
            own = [place if file == -1 else file for place, file in enumerate(files)]
            child = servers.fork(_request(asked), [*own, *asked["pass_fds"]])
        if child is None:
            real(process, *arguments)
            return
        process.pid = child
        process._child_created = True
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        process._close_pipe_fds(*(asked[pipe] for pipe in pipes))

    return execute_child


def _can_be_forked(asked: Mapping[str, Any], folder: str) -> bool:
    command = asked["args"]
    if not isinstance(command, (list, tuple)) or list(command[:2]) != [sys.executable, "-m"]:
        return False
    if len(command) < 3 or command[2] not in MODULES or os.getcwd() != folder:
        return False
    if asked["cwd"] not in (None, folder) or any(asked.get(name, value) != value for name, value in _PLAIN.items()):
        return False
    passed = asked["pass_fds"]
    is_small = len(passed) + 3 < MOST_DESCRIPTORS and max(passed, default=0) < ASIDE - 1
    return is_small and len("".join(command).encode()) + len(command) < LONGEST_COMMAND


def _request(asked: Mapping[str, Any]) -> dict[str, Any]:
    ignored = (
        name for name in ("SIGINT", "SIGTERM", "SIGHUP") if signal.getsignal(signal.Signals[name]) is signal.SIG_IGN
    )
    return {
        "words": asked["args"][2:],
        "environment": dict(os.environ if asked["env"] is None else asked["env"]),
        "pass_fds": list(asked["pass_fds"]),
        "start_new_session": asked["start_new_session"],
        "ignored": list(ignored),
    }


@contextlib.contextmanager
def _orphans_are_ours() -> Iterator[None]:
    """What loses its parent below this process becomes its child while the block runs."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(_PR_SET_CHILD_SUBREAPER, 1):
        raise OSError(ctypes.get_errno(), "this process cannot take in orphans")
    try:
        yield
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, 0)
